"""Which questions a frame makes due, where answers take longer than a frame."""

from collections.abc import Sequence
from typing import Any

from millpond.standing import StandingQuestion
from millpond.standing.questions import StandingQuestions, Wanted
from millpond.standing.schedule import Schedule


class Slow:
    """Answers when told to."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted, self.done = wanted, False

    def outcomes(self) -> Sequence[Any]:
        self.done = True  # who cannot wait any longer waits
        return [RuntimeError(question) for question, _ in self.wanted]


def test_a_question_that_is_due_while_it_is_being_answered_is_counted_and_not_asked() -> None:
    asked: list[Slow] = []

    def ask(wanted: Sequence[Wanted]) -> Slow:
        asked.append(Slow(wanted))
        return asked[-1]

    questions = StandingQuestions()
    slow, other = (StandingQuestion(text, Schedule(seconds), 1, None) for text, seconds in (("slow", 1), ("other", 4)))
    for question in (slow, other):
        questions.add(question, None)
    for second in range(5):
        questions.frame_taken(second * 1_000_000, ask)
    assert [each.wanted for each in asked] == [(("slow", 1),), (("other", 1),)]
    assert (slow.counts.overlapping, slow.counts.failed) == (3, 0)
    asked[0].done = True
    questions.frame_taken(5_000_000, ask)
    assert slow.counts.failed == 1
    assert slow.latest is not None
    assert (slow.latest.due_seconds, slow.latest.at_seconds) == (1.0, 1.0)
    assert len(asked) == 3
    questions.settle()
    assert (slow.counts.failed, other.counts.failed) == (2, 1)
    slow.cancel()
    questions.frame_taken(6_000_000, ask)
    assert len(asked) == 3
