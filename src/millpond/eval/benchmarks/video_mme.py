"""Video-MME without subtitles: short, medium and long videos, asked at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Part, Query, Score, accuracy, by_key
from millpond.eval.benchmarks.folder import Folder, Reader, RowError, as_object, letter, load_rows, objects, text, texts
from millpond.eval.benchmarks.letters import first_of_abcd

_LENGTHS = ("short", "medium", "long")
_ASKED = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{}\nThe best answer is:"
)


class VideoMME(Benchmark):
    """The table of the published data (`test-*.parquet`), or the same rows as JSON, also with `questions` nested a video.

    As the authors' scorer has it, answers in which no letter is found do not count at all.
    """

    name: ClassVar[str] = "video-mme"
    title: ClassVar[str] = "Video-MME"
    source: ClassVar[str] = "MME-Benchmarks/Video-MME, README and template; thanku-all/parse_answer"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        path = files.one(*(f"{name}*.json*" for name in ("videomme", "video_mme", "Video-MME")), "test-*.parquet")
        for place, row in enumerate(load_rows(path)):
            with reader.row(path, place):
                for fields in _questions(as_object(row)):
                    options, length = texts(fields, "options"), text(fields, "duration")
                    if length not in _LENGTHS:
                        raise RowError(f"'duration' must be one of {', '.join(_LENGTHS)}")
                    asked = "\n".join([text(fields, "question"), *options])
                    truth = {"answer": letter(fields, "answer", len(options)), "length": length}
                    video = text(fields, "videoID" if "videoID" in fields else "video_id")
                    query = Query(
                        text(fields, "question_id"), _ASKED.format(asked), text(fields, "task_type"), truth=truth
                    )
                    reader.add(video, query)
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        found = [(one.query, choice) for one in answered if (choice := first_of_abcd(one.text))]
        marks = [(query, choice == query.truth["answer"]) for query, choice in found]
        lengths = by_key([(query.truth["length"], right) for query, right in marks])
        parts: dict[str, Part] = {length: lengths[length] for length in _LENGTHS if length in lengths}
        parts |= by_key([(query.task, right) for query, right in marks])
        total = accuracy([right for _, right in marks])
        return Score(total.value, parts, len(answered) - len(found))


def _questions(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row is a question, or a video with several."""
    if "questions" not in row:
        yield row
        return
    shared = {key: value for key, value in row.items() if key != "questions"}
    for question in objects(row, "questions"):
        yield {**shared, **question}
