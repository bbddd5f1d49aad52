"""Two cells on the same questions of the same streams: surer than two intervals side by side. Knows only outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from millpond.accuracy.trial import Outcome

__all__ = ["Paired", "paired", "sign_test"]


@dataclass(frozen=True)
class Paired:
    """Questions that only one of two cells answered right.

    Attributes:
        won: only this cell. lost: only the other one. asked: questions that both were asked.
        p: of a difference at least as large if both were equally good, by the exact two-sided sign test (McNemar's, 1947).
    """

    won: int
    lost: int
    asked: int
    p: float


def paired(these: dict[int, Outcome], others: dict[int, Outcome]) -> Paired:
    """Compare outcomes by stream seed; streams that only one of them has do not count."""
    won = lost = asked = 0
    for seed in these.keys() & others.keys():
        for mine, other in zip(these[seed].marks, others[seed].marks, strict=False):
            asked += 1
            won += mine.right and not other.right
            lost += other.right and not mine.right
    return Paired(won, lost, asked, round(sign_test(won, lost), 6))


def sign_test(won: int, lost: int) -> float:
    """Probability that one of two sides wins at least as clearly when either wins each round with 1/2; ties are left out."""
    rounds = won + lost
    tail = sum(comb(rounds, count) for count in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << rounds))
