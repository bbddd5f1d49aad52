"""What questions are worth to somebody who remembers nothing: the floor under every accuracy on these streams.

Knows questions and when things showed; no pixels and no models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from millpond.eval.streams.splits import FPS
from millpond.eval.streams.video.questions import VideoQuestion

LAST_FRAMES = 4


@dataclass(frozen=True)
class Blind:
    """Shares of right answers, 0 to 1.

    Attributes:
        questions: how many were asked.
        random: guessing among the answers that a type has, each as often.
        most_frequent: always giving a type's most frequent answer.
        last_frames: knowing what the last four frames show and giving the most frequent answer otherwise.
    """

    questions: int
    random: float
    most_frequent: float
    last_frames: float


def known_from_last_frames(question: VideoQuestion) -> bool:
    """Whether the four frames before the question show all that its answer rests on."""
    now = round(question.ask_seconds * FPS)
    return question.evidence is not None and all(
        start < now and stop > now - LAST_FRAMES for start, stop in question.evidence
    )


def blind(questions: Iterable[VideoQuestion], known_answers: Iterable[VideoQuestion]) -> dict[str, Blind]:
    """The baselines of each question type, and of all under "all".

    Args:
        questions: to be answered.
        known_answers: questions of other streams (of the training split), whose answers are the guesses.
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known_answers:
        seen[question.type][question.answer] += 1
    kinds: dict[str, list[VideoQuestion]] = defaultdict(list)
    for question in questions:
        kinds[question.type].append(question)
    found = {}
    for kind, asked in kinds.items():
        # Equally frequent answers in the order of the alphabet.
        guess = min(seen[kind], key=lambda answer: (-seen[kind][answer], answer), default="")
        right = [question.answer == guess for question in asked]
        knows = [known_from_last_frames(question) for question in asked]
        chance = sum(question.answer in seen[kind] for question in asked) / max(1, len(seen[kind]))
        found[kind] = Blind(
            len(asked),
            chance / len(asked),
            sum(right) / len(asked),
            sum(a or b for a, b in zip(right, knows, strict=True)) / len(asked),
        )
    total = sum(row.questions for row in found.values())
    if total:
        found["all"] = Blind(
            total,
            *(
                sum(row.questions * getattr(row, name) for row in found.values()) / total
                for name in ("random", "most_frequent", "last_frames")
            ),
        )
    return found
