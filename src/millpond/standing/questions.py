"""The standing questions of one stream: which of them a frame makes due, and what becomes of those."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from millpond.answer import Answer
from millpond.standing.question import StandingQuestion
from millpond.standing.schedule import Due

Wanted = tuple[str, int]
"""A question's text and the most tokens of its answer."""


class Asked(Protocol):
    """Questions that are being answered."""

    @property
    def done(self) -> bool:
        """All of them have been."""

    def outcomes(self) -> Sequence[Answer | Exception]:
        """For each question its answer, or why there is none; waits until all are done."""


Ask = Callable[[Sequence[Wanted]], Asked]
"""Asks several questions, all different, about the stream as it is at this moment."""


@dataclass(frozen=True)
class _Running:
    """Questions that were due at one instant, in the order in which they were set up."""

    asked: Asked
    wanted: tuple[Wanted, ...]
    due: tuple[tuple[StandingQuestion, Due], ...]
    at_us: int


class StandingQuestions:
    """Those of one stream. Any thread may add one; the thread that feeds asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._questions: tuple[StandingQuestion, ...] = ()
        self._origin_us: int | None = None
        self._running: list[_Running] = []

    def __bool__(self) -> bool:
        return bool(self._questions)

    def add(self, question: StandingQuestion, now_us: int | None) -> None:
        """Ask it from now on; `now_us` is the time of the latest frame, None before the first."""
        with self._lock:
            if self._origin_us is None:
                self._origin_us = now_us
            if self._origin_us is not None and now_us is not None:
                question.schedule.begin(self._origin_us, now_us)
            self._questions = (*self._questions, question)

    def frame_taken(self, time_us: int, ask: Ask) -> None:
        """A frame has come in: tell what has been answered meanwhile, and ask what is due."""
        self._tell(wait=False)
        with self._lock:
            if self._origin_us is None:
                self._origin_us = time_us
            self._questions = tuple(question for question in self._questions if not question.cancelled)
            reached = [(each, each.schedule.reached(self._origin_us, time_us)) for each in self._questions]
        busy = {question for running in self._running for question, _ in running.due}
        due: list[tuple[StandingQuestion, Due]] = []
        for question, at in reached:
            if at is not None and question in busy:
                question.overlap(at)
            elif at is not None:
                due.append((question, at))
        if due:
            wanted = tuple(dict.fromkeys((question.question, question.max_new_tokens) for question, _ in due))
            self._running.append(_Running(ask(wanted), wanted, tuple(due), time_us))
            self._tell(wait=False)

    def settle(self) -> None:
        """Wait for what is being answered, and tell it."""
        self._tell(wait=True)

    def _tell(self, *, wait: bool) -> None:
        for running in [each for each in self._running if wait or each.asked.done]:
            self._running.remove(running)
            outcomes = dict(zip(running.wanted, running.asked.outcomes(), strict=True))
            told: set[Wanted] = set()
            for question, due in running.due:
                wanted = question.question, question.max_new_tokens
                question.tell(outcomes[wanted], due, running.at_us, reused=wanted in told)
                told.add(wanted)
