"""RVS-Ego and RVS-Movie: open questions at their times, scored by a judge model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Part, Query, Score, Verdict, accuracy
from millpond.eval.benchmarks.folder import Folder, Reader, as_object, load_rows, number, objects, text

_LONGEST_ANSWER = 256  # as in ReKV's program


class _RVS(Benchmark):
    """A JSON list of videos with `conversations`; each question is asked when its `end_time` is reached.

    Two figures, as published: the share of answers that the judge calls right, and the mean of its points from 0 to 5.
    """

    file: ClassVar[str]
    source: ClassVar[str] = "Becomebright/ReKV, video_qa/rekv_stream_vqa.py and eval/eval_open_ended.py"
    judged: ClassVar[bool] = True

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        path = files.one(self.file)
        for place, row in enumerate(load_rows(path)):
            with reader.row(path, place):
                fields = as_object(row)
                video = text(fields, "video_path")
                queries = []
                for turn, asked in enumerate(objects(fields, "conversations")):
                    question = text(asked, "question")
                    truth = {"question": question, "answer": text(asked, "answer")}
                    kind = asked.get("answer_type")
                    task = kind if isinstance(kind, str) and kind else "all"
                    id = f"{text(fields, 'video_id')}/{turn}"
                    queries.append(Query(id, question, task, number(asked, "end_time"), truth, _LONGEST_ANSWER))
                reader.add(video, *queries)
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        judged = [(one.query.task, one.verdict) for one in answered if one.verdict is not None]
        note = ""
        if missing := len(answered) - len(judged):
            note = f"{missing} of {len(answered)} answers are not judged: give --judge"
        if missing or not judged:
            return Score(None, {}, note=note or "nothing is judged")
        parts = _figures([verdict for _, verdict in judged], "")
        for task in dict.fromkeys(task for task, _ in judged if task != "all"):
            parts |= _figures([verdict for kind, verdict in judged if kind == task], f"{task}, ")
        return Score(parts["accuracy"].value, parts)


class RVSEgo(_RVS):
    name: ClassVar[str] = "rvs-ego"
    title: ClassVar[str] = "RVS-Ego"
    file: ClassVar[str] = "ego4d_oe.json"


class RVSMovie(_RVS):
    name: ClassVar[str] = "rvs-movie"
    title: ClassVar[str] = "RVS-Movie"
    file: ClassVar[str] = "movienet_oe.json"


def _figures(verdicts: Sequence[Verdict], before: str) -> dict[str, Part]:
    points = sum(verdict.score for verdict in verdicts) / len(verdicts)
    return {
        f"{before}accuracy": accuracy([verdict.yes for verdict in verdicts]),
        f"{before}score": Part(points, len(verdicts), "of 5"),
    }
