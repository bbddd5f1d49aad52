"""MLVU: long videos, seven multiple-choice tasks, asked at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from millpond.errors import MillpondError
from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Query, Score, by_key, mean
from millpond.eval.benchmarks.folder import Folder, Reader, RowError, as_object, load_rows, text, texts
from millpond.eval.benchmarks.letters import before_bracket, lettered
from millpond.printable import printable

_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
"""Sub-scene captions and summaries, the other two, have no choices and are scored by a judge of their own: left out."""


class MLVU(Benchmark):
    """A JSON list a task (`1_plotQA.json`, ...) and a folder of videos a task. The dev set, whose answers are published.

    The question is that of the authors' program, whose answer is begun for the model ("Best Option: ("); these words stand at the end
    of the question here, as in lmms-eval. M-Avg, the mean over tasks.
    """

    name: ClassVar[str] = "mlvu"
    title: ClassVar[str] = "MLVU"
    source: ClassVar[str] = "JUNJIE99/MLVU, choice_bench.py and data/; lmms-eval, tasks/mlvu"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        found = [(task, paths[0]) for task in _TASKS if (paths := files.named(f"[0-9]_{task}.json", f"{task}.json"))]
        if not found:
            raise MillpondError(
                f"there is no file of a task, such as 1_{_TASKS[0]}.json, in or below {printable(str(folder))}"
            )
        for task, path in found:
            for place, row in enumerate(load_rows(path)):
                with reader.row(path, place):
                    fields = as_object(row)
                    video, options = text(fields, "video"), texts(fields, "candidates")
                    answer = fields.get("answer")
                    if str(answer) not in options:
                        raise RowError("'answer' must be one of the candidates")
                    right = chr(ord("A") + options.index(str(answer)))
                    asked = f"Question: {text(fields, 'question')}\nOptions:\n" + "\n".join(
                        lettered(options, "({}) {}")
                    )
                    prompt = f"{asked}\nOnly give the best option.\nBest option: ("
                    reader.add(
                        f"{path.stem}/{video}",
                        Query(f"{task}/{place}", prompt, task, truth={"answer": right}),
                        also=f"{task}/{video}",
                    )
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        chosen = [(one.query, before_bracket(one.text)) for one in answered]
        parts = by_key([(query.task, choice == query.truth["answer"]) for query, choice in chosen])
        return Score(mean([*parts.values()]), parts, sum(len(choice) != 1 for _, choice in chosen))
