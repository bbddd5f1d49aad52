"""What a standing question gives: an event each time it was asked, and counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from millpond.answer import Answer


@dataclass(frozen=True)
class Counts:
    """What became of a standing question so far.

    Attributes:
        answered: times it was answered.
        changed: of those, with another answer than before, the first one included.
        reused: of those, without a run of their own: the same question was due at the same instant.
        late: times it was asked when the stream had jumped over due times before.
        missed: due times that the stream jumped over; not asked at.
        overlapping: due times at which the one before was still being answered; not asked at.
        failed: times it could not be answered.
        callbacks_failed: times `on_answer` raised.
    """

    answered: int = 0
    changed: int = 0
    reused: int = 0
    late: int = 0
    missed: int = 0
    overlapping: int = 0
    failed: int = 0
    callbacks_failed: int = 0


@dataclass(frozen=True, eq=False)
class StandingEvent:
    """A standing question was asked.

    Attributes:
        kind: "changed" or "same", by the text of the answer before; the first answer has changed. Or "failed".
        question: as asked. every_seconds: its interval.
        answer: None where it failed.
        previous: text of the answer before; None where there was none.
        error: why it failed; None otherwise.
        due_seconds: the due time. at_seconds: time of the latest frame when it was asked.
        missed: due times before this one that the stream had jumped over.
        reused: another question's answer, the same one at the same instant.
        counts: of the question, this event included.
    """

    kind: Literal["changed", "same", "failed"]
    question: str
    every_seconds: float
    answer: Answer | None
    previous: str | None
    error: Exception | None
    due_seconds: float
    at_seconds: float
    missed: int
    reused: bool
    counts: Counts

    @property
    def text(self) -> str | None:
        """The answer's text."""
        return None if self.answer is None else self.answer.text

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, the answer and the error as text."""
        return {
            "kind": self.kind,
            "question": self.question,
            "every_seconds": self.every_seconds,
            "answer": self.text,
            "previous": self.previous,
            "error": None if self.error is None else f"{self.error}" or type(self.error).__name__,
            "due_seconds": self.due_seconds,
            "at_seconds": self.at_seconds,
            "missed": self.missed,
            "reused": self.reused,
            "counts": asdict(self.counts),
        }
