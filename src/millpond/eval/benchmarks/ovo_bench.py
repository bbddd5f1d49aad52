"""OVO-Bench: questions at moments of a stream, about what was (backward), what is (real-time), and whether it is time to say (forward)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Part, Query, Score, accuracy, mean
from millpond.eval.benchmarks.folder import (
    Folder,
    Reader,
    RowError,
    as_object,
    index,
    load_rows,
    number,
    objects,
    text,
    texts,
)
from millpond.eval.benchmarks.letters import lettered

_GROUPS = {
    "backward": ("EPM", "ASI", "HLD"),
    "real-time": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
_CHOICES = (*_GROUPS["backward"], *_GROUPS["real-time"])
# The benchmark's words (constant.py), its spelling included: a model answers what it is asked.
_CHOOSE = """
Question: {}
Options:
{}

Respond only with the letter corresponding to your chosen option (e.g., A, B, C). 
Do not include any additional text or explanation in your response.
"""  # noqa: W291
_COUNT = """
You're watching a video in which people may perform a certain type of action repetively. 
The person performing this kind of action are referred to as 'they' in the following statement.
You're task is to count how many times have different people in the video perform this kind of action in total.
One complete motion counts as one. 
Now, answer the following question: {}
Provide your answer as a single number (e.g., 0, 1, 2, 3…) indicating the total count.
Do not include any additional text or explanation in your response.
"""  # noqa: W291
_STEP = """
You're watching a tutorial video which contain a sequential of steps. 
The following is one step from the whole procedures: 
{}
Your task is to determine if the man or woman in the video is currently performing this step.
Answer only with “Yes” or “No”.
Do not include any additional text or explanation in your response.
"""  # noqa: W291
_ENOUGH = """
You're responsible of answering questions based on the video content. 
The following question are relevant to the latest frames, i.e. the end of the video.
{}
Decide whether existing visual content, especially latest frames, i.e. frames that near the end of the video, provide enough information for answering the question.
Answer only with “Yes” or “No”.
Do not include any additional text or explanation in your response.
"""  # noqa: W291
_LONGEST_ANSWER = 128  # as in the authors' program


class OVOBench(Benchmark):
    """`ovo_bench_new.json` and the source videos: one pass over each, every question at its own time. Where only the clips that end at
    a question's time are there (`chunked_videos`), each is a stream of its own, asked at its end.

    The three groups are the means of their tasks, the total the mean of the three.
    """

    name: ClassVar[str] = "ovo-bench"
    title: ClassVar[str] = "OVO-Bench"
    source: ClassVar[str] = "JoeLeelyf/OVO-Bench, constant.py, utils/OVOBench.py, utils/OVOBenchScore.py, data/"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        path = files.one("ovo_bench_new.json", "ovo_bench.json")
        rows = load_rows(path)
        whole = any(_is_there(files, row) for row in rows)
        clips = not whole and any("chunked_videos" in path.parts for path in files.named("*.mp4"))
        for place, row in enumerate(rows):
            with reader.row(path, place):
                fields = as_object(row)
                video, queries = text(fields, "video"), [*_queries(fields, timed=not clips)]
                if not clips:
                    reader.add(video, *queries)
                for query in queries if clips else ():
                    reader.add(f"chunked_videos/{query.id}.mp4", query)
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        marks: dict[str, list[bool]] = {}
        for one in answered:
            marks.setdefault(one.query.task, []).append(_right(one))
        parts: dict[str, Part] = {}
        groups: list[Part] = []
        for group, tasks in _GROUPS.items():
            found = {task: accuracy(marks[task]) for task in tasks if task in marks}
            parts |= found
            if (value := mean([*found.values()])) is not None:
                parts[group] = Part(value, sum(part.questions for part in found.values()))
                groups.append(parts[group])
        if len(groups) < len(_GROUPS):
            return Score(None, parts, note="a total needs questions of all three groups")
        return Score(mean(groups), parts)


def _is_there(files: Folder, row: Any) -> bool:
    """Whether a row's source video is."""
    try:
        return isinstance(row, dict) and isinstance(row.get("video"), str) and files.video(row["video"]) is not None
    except LookupError:
        return True


def _queries(row: dict[str, Any], *, timed: bool) -> Iterator[Query]:
    """The questions of a row: one, or one for each moment of its `test_info`."""
    name, task = row.get("id"), text(row, "task")
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise RowError("'id' must be a number or text")
    if task in _CHOICES:
        options = texts(row, "options")
        prompt = _CHOOSE.format(text(row, "question"), "; ".join(lettered(options, "{}. {}")) + ";")
        truth = {"answer": index(row, "gt", len(options))}
        seconds = number(row, "realtime")
        yield Query(str(name), prompt, task, seconds if timed else None, truth, _LONGEST_ANSWER)
        return
    if task not in _GROUPS["forward"]:
        raise RowError(f"there is no task {task!r}")
    for place, moment in enumerate(objects(row, "test_info")):
        seconds = number(moment, "realtime")
        if task == "REC":
            prompt = _COUNT.format(f"How many times did they {text(row, 'activity')}?")
            truth = {"answer": f"{number(moment, 'count'):.0f}"}
        else:
            if moment.get("type") not in (0, 1):
                raise RowError("'type' of a moment must be 0 (not yet) or 1")
            prompt = _STEP.format(text(moment, "step")) if task == "SSR" else _ENOUGH.format(text(row, "question"))
            truth = {"answer": "Yes" if moment["type"] else "No"}
        yield Query(f"{name}_{place}", prompt, task, seconds if timed else None, truth, _LONGEST_ANSWER)


def _right(one: Answered) -> bool:
    """The authors' rule: all digits together are the count, a lone Y or N is a yes or a no, and else the right words occur in the answer."""
    wanted: str = one.query.truth["answer"]
    if one.query.task == "REC":
        return "".join(re.findall(r"\d+", one.text)) == wanted
    if one.query.task in _GROUPS["forward"] and one.text in ("Y", "N"):
        return one.text == wanted[0]
    return wanted in one.text
