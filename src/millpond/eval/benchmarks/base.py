"""What every public benchmark is read into, and the contract of one: annotations in, scores out. Knows nothing about models or sessions."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Query:
    """One question as it is put to the model.

    Attributes:
        id: unique within the benchmark.
        prompt: the whole text, in the benchmark's own words.
        task: the benchmark's name for its kind.
        seconds: stream time at which it is asked: of frames before it. None: at the end of the video.
        truth: what scoring needs beside the answer.
        max_new_tokens: the longest answer.
        after_yes: id of a query of the same video, asked before; this one is asked only where that one's answer has a "yes" in it.
            Such a query is a part of that one and not counted by itself.
    """

    id: str
    prompt: str
    task: str
    seconds: float | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 16
    after_yes: str | None = None


@dataclass(frozen=True)
class Video:
    """A file and everything that is asked about it, in the order of asking.

    Attributes:
        id: as the annotations call it; unique. path: where it lies.
    """

    id: str
    path: Path
    queries: tuple[Query, ...]


FaultKind = Literal["malformed row", "missing video", "refused question"]


@dataclass(frozen=True)
class Fault:
    """What cannot be asked, in one line: its kind, and how many questions are left out for it."""

    kind: FaultKind
    line: str
    questions: int = 1


@dataclass(frozen=True)
class Annotations:
    """A benchmark on disk.

    Attributes:
        videos: those that are there.
        faults: rows that say nothing usable, and videos that are not there.
        queries: all questions, whether or not their videos are there. fingerprint: of them, the same on every machine.
    """

    videos: tuple[Video, ...]
    faults: tuple[Fault, ...]
    queries: tuple[Query, ...]
    fingerprint: str


def fingerprint(queries: Sequence[tuple[str, Query]]) -> str:
    """Of questions and the videos that they are about: changes with whatever changes an answer or its score."""
    rows = sorted(
        [video, query.id, query.prompt, query.task, query.seconds, query.truth, query.max_new_tokens, query.after_yes]
        for video, query in queries
    )
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer: whether it matches, and how well, from 0 to 5."""

    yes: bool
    score: int


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer, and a judge's verdict where there is one."""

    query: Query
    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Part:
    """One figure: per cent (or points, where `unit` says so) over so many questions."""

    value: float
    questions: int
    unit: str = "%"


@dataclass(frozen=True)
class Score:
    """What the benchmark's own scorer makes of the answers.

    Attributes:
        total: the one number that is published; None where it cannot be had, and `note` says why.
        parts: by task, category or length, as the benchmark reports them.
        unreadable: answers in which the benchmark's rule found no choice.
    """

    total: float | None
    parts: dict[str, Part]
    unreadable: int = 0
    note: str = ""


class Benchmark(ABC):
    """A public benchmark: where its files come from, how it asks, how it scores."""

    name: ClassVar[str]
    """As on the command line."""
    title: ClassVar[str]
    source: ClassVar[str]
    """Where the file format, the words of the questions and the rule of the score were read."""
    judged: ClassVar[bool] = False
    """Whether its answers are scored by a judge model."""

    @abstractmethod
    def read(self, folder: Path) -> Annotations:
        """The annotations and videos below a folder.

        Raises:
            MillpondError: there are no annotations, or they cannot be read at all. A single row that says nothing usable is a fault
                of the annotations instead.
        """

    @abstractmethod
    def score(self, answered: Sequence[Answered]) -> Score:
        """As the benchmark's own scorer does it, over the questions that were asked."""

    def submission(self, answered: Sequence[Answered]) -> Any | None:
        """What the benchmark's server takes, where answers are kept from the public; None where nothing is to be sent."""
        return None


def accuracy(marks: Sequence[bool]) -> Part:
    """Per cent of right answers; 0 of none."""
    return Part(100 * sum(marks) / len(marks) if marks else 0.0, len(marks))


def by_key(pairs: Sequence[tuple[str, bool]]) -> dict[str, Part]:
    """Accuracy of each key, in the order in which the keys first come."""
    groups: dict[str, list[bool]] = {}
    for key, right in pairs:
        groups.setdefault(key, []).append(right)
    return {key: accuracy(marks) for key, marks in groups.items()}


def mean(parts: Sequence[Part]) -> float | None:
    """Of the parts' values, each counted once; None of none."""
    return sum(part.value for part in parts) / len(parts) if parts else None
