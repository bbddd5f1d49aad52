"""LongVideoBench without subtitles: four groups of length, asked at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Query, Score, accuracy, by_key
from millpond.eval.benchmarks.folder import Folder, Reader, as_object, index, load_rows, text, texts
from millpond.eval.benchmarks.letters import first_of_abcde, lettered

_MOST = 5


class LongVideoBench(Benchmark):
    """`lvb_val.json` (or the table of the same rows), else `lvb_test_wo_gt.json`, whose answers are sent to the authors."""

    name: ClassVar[str] = "longvideobench"
    title: ClassVar[str] = "LongVideoBench"
    source: ClassVar[str] = "longvideobench/LongVideoBench, longvideobench_dataset.py; lmms-eval, tasks/longvideobench"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        path = files.one("lvb_val.json", "validation-*.parquet", "lvb_test_wo_gt.json")
        for place, row in enumerate(load_rows(path)):
            with reader.row(path, place):
                fields = as_object(row)
                options = _options(fields)
                truth: dict[str, Any] = {"options": len(options), "seconds": str(fields.get("duration_group"))}
                if fields.get("correct_choice") is not None:
                    truth["answer"] = index(fields, "correct_choice", len(options))
                lines = [f"Question: {text(fields, 'question')}", *lettered(options, "{}. {}")]
                prompt = "\n".join([*lines, "Answer with the option's letter from the given choices directly."])
                query = Query(
                    text(fields, "id"), prompt, text(fields, "question_category"), truth=truth, max_new_tokens=32
                )
                reader.add(text(fields, "video_path"), query)
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        known = [one for one in answered if "answer" in one.query.truth]
        marks = [(one.query, *_chosen(one)) for one in known]
        right = [(query, choice == query.truth["answer"]) for query, choice, _ in marks]
        groups = by_key([(f"{query.truth['seconds']} s", mark) for query, mark in right])
        parts = {key: groups[key] for key in sorted(groups, key=lambda key: (len(key), key))}
        parts |= by_key([(query.task, mark) for query, mark in right])
        unreadable = sum(not found for _, _, found in marks)
        if not known:
            return Score(None, {}, 0, "the answers are not public: send submission.json to the authors")
        return Score(accuracy([mark for _, mark in right]).value, parts, unreadable)

    def submission(self, answered: Sequence[Answered]) -> dict[str, str] | None:
        if all("answer" in one.query.truth for one in answered):
            return None
        return {one.query.id: _chosen(one)[0] for one in answered}


def _options(row: dict[str, Any]) -> list[str]:
    """`candidates`, or `option0` ... `option4` up to the first that is "N/A"."""
    if "candidates" in row:
        return texts(row, "candidates", most=_MOST)
    options: list[Any] = []
    for place in range(_MOST):
        if (option := row.get(f"option{place}", "N/A")) == "N/A":
            break
        options.append(option)
    return texts({"option0, option1, ...": options}, "option0, option1, ...")


def _chosen(one: Answered) -> tuple[str, bool]:
    choices = [chr(ord("A") + place) for place in range(one.query.truth["options"])]
    return first_of_abcde(one.text, one.query.id, choices)
