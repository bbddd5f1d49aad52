"""Two cells on the same questions of the same streams: surer than two intervals side by side. Knows nothing about policies or models."""

from __future__ import annotations

from dataclasses import dataclass

from millpond.eval.accuracy.intervals import difference, sign_flips
from millpond.eval.accuracy.trial import Outcome


@dataclass(frozen=True)
class Paired:
    """Questions that only one of two cells answered right.

    Attributes:
        won: only this cell. lost: only the other one. asked: questions that both were asked. streams: that they are about.
        difference: of the shares of right answers. low, high: its 95 % interval by the variance between streams.
        p: of a difference at least as large if, in every stream, either cell were as likely to be the better one: exact,
            two-sided, over streams (`millpond.eval.accuracy.intervals.sign_flips`).
    """

    won: int
    lost: int
    asked: int
    streams: int
    difference: float
    low: float
    high: float
    p: float


def paired(these: dict[int, Outcome], others: dict[int, Outcome]) -> Paired:
    """Compare outcomes by stream seed; streams that only one of them has do not count."""
    won = lost = asked = 0
    margins: list[tuple[int, int]] = []
    for seed in sorted(these.keys() & others.keys()):
        both = list(zip(these[seed].marks, others[seed].marks, strict=False))
        ahead = sum(mine.right and not other.right for mine, other in both)
        behind = sum(other.right and not mine.right for mine, other in both)
        won, lost, asked = won + ahead, lost + behind, asked + len(both)
        if both:
            margins.append((ahead - behind, len(both)))
    p = round(sign_flips([margin for margin, _ in margins]), 6)
    return Paired(won, lost, asked, len(margins), *difference(margins), p)
