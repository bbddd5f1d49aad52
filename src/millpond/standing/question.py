"""One standing question: who asked for it looks in here, and ends it."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from millpond.answer import Answer
from millpond.errors import MillpondError
from millpond.standing.event import Counts, StandingEvent
from millpond.standing.schedule import Due, Schedule

_KEPT_EVENTS = 100

OnAnswer = Callable[[StandingEvent], Any]


class StandingQuestion:
    """A question that is asked again and again; `millpond.Session.every` makes it.

    Attributes:
        question, max_new_tokens: as given.
        cancelled: it is not asked any more.
    """

    def __init__(self, question: str, schedule: Schedule, max_new_tokens: int, on_answer: OnAnswer | None) -> None:
        if on_answer is not None and not callable(on_answer):
            raise MillpondError(f"on_answer is called with an event, and {on_answer!r} cannot be called")
        self.question, self.max_new_tokens, self.cancelled = question, max_new_tokens, False
        self.schedule = schedule
        self._on_answer = on_answer
        self._counts = Counts()
        self._latest: StandingEvent | None = None
        self._previous: str | None = None
        self._unread: deque[StandingEvent] = deque(maxlen=_KEPT_EVENTS)
        self._told = threading.Condition()

    @property
    def every_seconds(self) -> float:
        """The interval."""
        return self.schedule.seconds

    @property
    def counts(self) -> Counts:
        """What became of it so far."""
        return self._counts

    @property
    def latest(self) -> StandingEvent | None:
        """The latest event; None before the first."""
        return self._latest

    def cancel(self) -> None:
        """Ask no more; from any thread, also within `on_answer`. An answer that is being given is not told."""
        with self._told:
            self.cancelled = True
            self._told.notify_all()

    def events(self, timeout: float | None = None) -> Iterator[StandingEvent]:
        """Events that were not read yet, at most the latest 100, and then those to come; in a thread that does not feed.

        Ends when the question is cancelled, or when `timeout` wall seconds have brought none: 0 gives what there is.
        """
        while True:
            with self._told:
                self._told.wait_for(lambda: self._unread or self.cancelled, timeout)
                if not self._unread:
                    return
                event = self._unread.popleft()
            yield event

    # --- for the one that asks ----------------------------------------------------------------------------------

    def overlap(self, due: Due) -> None:
        """It was due while it was being answered still."""
        with self._told:
            counts = self._counts
            self._counts = replace(counts, overlapping=counts.overlapping + 1, missed=counts.missed + due.missed)

    def tell(self, outcome: Answer | Exception, due: Due, at_us: int, *, reused: bool) -> None:
        """It was asked: count it, keep the event, and call back."""
        failed = isinstance(outcome, Exception)
        with self._told:
            if self.cancelled:
                return
            text = None if isinstance(outcome, Exception) else outcome.text
            changed = not failed and text != self._previous
            counts = self._counts
            self._counts = replace(
                counts,
                answered=counts.answered + (not failed),
                changed=counts.changed + changed,
                reused=counts.reused + (reused and not failed),
                late=counts.late + (due.missed > 0),
                missed=counts.missed + due.missed,
                failed=counts.failed + failed,
            )
            event = self._latest = StandingEvent(
                kind="failed" if failed else "changed" if changed else "same",
                question=self.question,
                every_seconds=self.every_seconds,
                answer=None if isinstance(outcome, Exception) else outcome,
                previous=self._previous,
                error=outcome if isinstance(outcome, Exception) else None,
                due_seconds=due.time_us / 1e6,
                at_seconds=at_us / 1e6 if isinstance(outcome, Exception) else outcome.at_seconds,
                missed=due.missed,
                reused=reused and not failed,
                counts=self._counts,
            )
            self._previous = self._previous if failed else text
            self._unread.append(event)
            self._told.notify_all()
        if self._on_answer is not None:
            self._call(self._on_answer, event)

    def _call(self, on_answer: OnAnswer, event: StandingEvent) -> None:
        """Call back; what is raised there is said once and counted: it is no reason to end the stream."""
        try:
            on_answer(event)
        except Exception as error:
            with self._told:
                first = not self._counts.callbacks_failed
                self._counts = replace(self._counts, callbacks_failed=self._counts.callbacks_failed + 1)
            if first:
                what = f"on_answer of {self.question!r} raised {type(error).__name__}: {error}"
                warnings.warn(f"{what}; it is called on, and what it raises is counted", RuntimeWarning, stacklevel=2)
