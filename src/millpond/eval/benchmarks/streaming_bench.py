"""StreamingBench: about five questions at their times in each of 900 videos; each is asked of the whole stream so far."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from millpond.errors import MillpondError
from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Query, Score, accuracy, by_key
from millpond.eval.benchmarks.folder import Folder, Reader, RowError, as_object, letter, load_rows, objects, text, texts
from millpond.eval.benchmarks.letters import first_character, lettered
from millpond.printable import printable

_PARTS = ("real", "omni", "sqa", "proactive")
_SHOWN = 4  # of a few questions with more options the authors' program shows the first four
# The benchmark's words (src/benchmark/): a model answers what it is asked.
_CHOOSE = """You are an advanced video question-answering AI assistant. You have been provided with some frames from the video and a multiple-choice question related to the video. Your task is to carefully analyze the video and provide the best answer to question, choosing from the four options provided. Respond with only the letter (A, B, C, or D) of the correct option.

Question: {}

Options:
{}

The best option is:"""
_SEQUENTIAL = """You are an advanced video question-answering AI assistant. You have been provided with a video and a multiple-choice question related to the video. Your task is to carefully analyze the video and the provided context to answer the question, choosing from the four options provided. Respond with only the letter (A, B, C, or D) of the correct option.

{}

Here is the question. Answer it and don't confuse it with the previous conversation.
Question: {}

Options:
{}

The best option is:"""
_CONTEXT = (
    "Here are the contextual information related to the video. "
    "Please answer the questions based on the contextual information: "
)
_TURN = "At timestamp {}, the following question and answer occurred: Question: {}; Options: {}; Answer: {}; "
_PROACTIVE = """You are an advanced image question-answering AI assistant. You have been provided with images and a question related to the images. Your task is to carefully analyze the images and provide the answer to the question. You need to carefully confirm whether the images content meet the conditions of the question, and then output the correct content.

Question: {}

The answer is:
"""
_IS_IT_TIME = '{} Is it the right time to output "{}"? You can only answer yes or no.'
_LATE, _CLOSE = 4, 2  # seconds: how long after the right time is asked, and how far from it an answer may come
_OUTPUT_TOKENS = 64


class StreamingBench(Benchmark):
    """`questions_real.json`, `questions_omni.json`, `questions_sqa.json`, `questions_proactive.json`: whichever are there.

    The total is over all questions with choices; published totals are those of `questions_real.json` alone. Proactive output is asked
    every second whether it is time, and for the output where the answer is yes; the first yes must come within 2 s.
    """

    name: ClassVar[str] = "streamingbench"
    title: ClassVar[str] = "StreamingBench"
    source: ClassVar[str] = "THUNLP-MT/StreamingBench, src/benchmark/, src/data/count.py and questions"

    def read(self, folder: Path) -> Annotations:
        files = Folder(folder)
        reader = Reader(files)
        found = [(part, paths[0]) for part in _PARTS if (paths := files.named(f"questions_{part}.json"))]
        if not found:
            raise MillpondError(
                f"there is no questions_{_PARTS[0]}.json or another part in or below {printable(str(folder))}"
            )
        for part, path in found:
            for place, row in enumerate(load_rows(path)):
                with reader.row(path, place):
                    name = f"{part}/{place}"
                    if part == "sqa":
                        for video, query in _sequential(name, row):
                            reader.add(video, query)
                        continue
                    fields = as_object(row)
                    make = _proactive if part == "proactive" else _choices
                    reader.add(_video(fields), *make(name, fields))
        return reader.done()

    def score(self, answered: Sequence[Answered]) -> Score:
        chosen = [(one.query, first_character(one.text)) for one in answered if "answer" in one.query.truth]
        marks = [(query.task, choice == query.truth["answer"]) for query, choice in chosen]
        parts = by_key(marks)
        timely, right = _proactive_marks(answered)
        if timely:
            parts["Proactive Output"] = accuracy(right)
            parts["Proactive Output, time alone"] = accuracy(timely)
        total = accuracy([mark for _, mark in marks]).value if marks else None
        return Score(total, parts, sum(choice not in "ABCD" or not choice for _, choice in chosen))


def _video(row: dict[str, Any]) -> str:
    """The name alone: the authors' preparation writes whole paths of their machine into the file."""
    return PurePosixPath(text(row, "video_path")).name


def _seconds(row: dict[str, Any], key: str) -> int:
    """`"00:03:10"` as 190."""
    stamp = text(row, key).strip()
    if not re.fullmatch(r"\d+(:\d+){0,2}", stamp):
        raise RowError(f"{key!r} must be a time such as 00:03:10, not {printable(stamp)}")
    seconds = 0
    for part in stamp.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def _options(row: dict[str, Any]) -> list[str]:
    options = texts(row, "options", fewest=_SHOWN)[:_SHOWN]
    return options if options[0].startswith("A.") else lettered(options, "{}. {}")


def _choices(name: str, row: dict[str, Any]) -> Iterator[Query]:
    for place, question in enumerate(objects(row, "questions")):
        options = _options(question)
        prompt = _CHOOSE.format(text(question, "question"), "\n".join(options))
        truth = {"answer": letter(question, "answer", _SHOWN)}
        yield Query(f"{name}/{place}", prompt, text(question, "task_type"), _seconds(question, "time_stamp"), truth)


def _sequential(name: str, rows: Any) -> Iterator[tuple[str, Query]]:
    """A video's questions, each told those before it and their right answers."""
    if not isinstance(rows, list):
        raise RowError("it must be a list: a video's questions one after the other")
    context, place = "", 0
    for row in map(as_object, rows):
        for question in objects(row, "questions"):
            options, asked = _options(question), text(question, "question")
            answer = letter(question, "answer", _SHOWN)
            prompt = _SEQUENTIAL.format(context, asked, "\n".join(options))
            seconds = _seconds(question, "time_stamp")
            yield (
                _video(row),
                Query(f"{name}/{place}", prompt, text(question, "task_type"), seconds, {"answer": answer}),
            )
            context = (context or _CONTEXT) + _TURN.format(
                text(question, "time_stamp"), asked, ", ".join(options), answer
            )
            place += 1


def _proactive(name: str, row: dict[str, Any]) -> Iterator[Query]:
    for place, question in enumerate(objects(row, "questions")):
        asked, wanted = text(question, "question"), text(question, "ground_truth_output")
        begun, right = _seconds(question, "time_stamp"), _seconds(question, "ground_truth_time_stamp")
        poll, output = _PROACTIVE.format(_IS_IT_TIME.format(asked, wanted)), _PROACTIVE.format(asked)
        task = text(question, "task_type")
        for seconds in range(begun + 1, right + _LATE + 1):
            id, truth = f"{name}/{place}/{seconds}", {"of": f"{name}/{place}", "late": seconds - right}
            yield Query(id, poll, task, seconds, truth)
            yield Query(
                f"{id}/output", output, task, seconds, {**truth, "output": wanted}, _OUTPUT_TOKENS, after_yes=id
            )


def _proactive_marks(answered: Sequence[Answered]) -> tuple[list[bool], list[bool]]:
    """For each question for an output: whether the first yes came in time, and whether its output was right too."""
    outputs: dict[str, list[Answered]] = {}
    for one in answered:
        if "of" in one.query.truth:
            outputs.setdefault(one.query.truth["of"], [])
            if "output" in one.query.truth:
                outputs[one.query.truth["of"]].append(one)
    first = [min(found, key=lambda one: one.query.truth["late"], default=None) for found in outputs.values()]
    timely = [one is not None and abs(one.query.truth["late"]) <= _CLOSE for one in first]
    right = [
        soon and one is not None and one.query.truth["output"] in one.text
        for one, soon in zip(first, timely, strict=True)
    ]
    return timely, right
