"""How sure a share of right answers is, and a difference of two, when questions come in streams. Knows only counts.

Questions about one stream share its events, its noise and what was kept of it, so they are no independent draws: a stream is. All
of this is exact arithmetic on the counts of each stream; nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Right answers among those asked, with a 95 % interval."""

    right: int
    asked: int
    share: float
    low: float
    high: float


def wilson(right: int, asked: int, effective: float | None = None) -> Accuracy:
    """The score interval of Wilson (1927) at 95 %, as if the share came from `effective` independent questions: all, by default."""
    effective = asked if effective is None else effective
    if asked == 0 or effective <= 0:
        return Accuracy(right, asked, round(right / max(asked, 1), 4), 0.0, 1.0)
    share, size = right / asked, effective
    middle = (share + _Z * _Z / (2 * size)) / (1 + _Z * _Z / size)
    half = _Z / (1 + _Z * _Z / size) * math.sqrt(share * (1 - share) / size + _Z * _Z / (4 * size * size))
    return Accuracy(right, asked, round(share, 4), max(0.0, round(middle - half, 4)), min(1.0, round(middle + half, 4)))


def clustered(streams: Sequence[tuple[int, int]]) -> Accuracy:
    """The interval of a share whose questions come in streams: Wilson's, with the effective number of questions.

    That number is the one asked, divided by the design effect (the variance of the share between streams, linearised as a ratio, over
    that of independent questions, and at least 1) and by the square of Student's factor for so many streams: Korn and Graubard,
    Survey Methodology 24, 1998, with Wilson's interval in place of Clopper and Pearson's. One stream says nothing about others: 0 to 1.

    Args:
        streams: (right, asked) of each stream; those that were asked nothing do not count.
    """
    counts = np.array([pair for pair in streams if pair[1]], dtype=np.float64).reshape(-1, 2)
    right, asked = (int(total) for total in counts.sum(axis=0))
    if len(counts) < 2:
        return wilson(right, asked, 0)
    share = right / asked
    between = _ratio_variance(counts[:, 0], counts[:, 1])
    alone = share * (1 - share) / asked
    effect = max(1.0, between / alone) if alone else 1.0
    return wilson(right, asked, asked / effect * (_Z / _student(len(counts) - 1)) ** 2)


def difference(streams: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """A difference of two shares on the same questions, and its 95 % interval by the variance between streams.

    Args:
        streams: (questions that only one of the two answered right less those that only the other did, asked) of each stream.

    Returns:
        The difference, its smallest and its largest value; -1 to 1 for fewer than two streams.
    """
    counts = np.array([pair for pair in streams if pair[1]], dtype=np.float64).reshape(-1, 2)
    if not len(counts):
        return 0.0, -1.0, 1.0
    won, asked = counts[:, 0], counts[:, 1]
    gap = float(won.sum() / asked.sum())
    if len(counts) < 2:
        return round(gap, 4), -1.0, 1.0
    half = _student(len(counts) - 1) * math.sqrt(_ratio_variance(won, asked))
    return round(gap, 4), max(-1.0, round(gap - half, 4)), min(1.0, round(gap + half, 4))


def sign_flips(margins: Sequence[int]) -> float:
    """Probability of a total at least as far from 0 as that of `margins` if each stream's margin were as likely to be its negative.

    The exact two-sided randomisation test over streams (Fisher 1935): every one of the 2^S ways is counted, by convolution.
    """
    known = [abs(margin) for margin in margins if margin]
    reach, total = sum(known), abs(sum(margins))
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for margin in known:
        up, down = np.roll(chance, margin), np.roll(chance, -margin)  # nothing lies far enough out to come round
        chance = (up + down) / 2
    away = np.abs(np.arange(-reach, reach + 1)) >= total
    return min(1.0, float(chance[away].sum()))


def holm(chances: Sequence[float]) -> list[float]:
    """Probabilities adjusted for all of them being looked at, by the step-down rule of Holm (1979), in the order given."""
    adjusted, worst = [0.0] * len(chances), 0.0
    for rank, at in enumerate(sorted(range(len(chances)), key=lambda at: chances[at])):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[at]))
        adjusted[at] = worst
    return adjusted


def _ratio_variance(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Variance of sum(parts) / sum(wholes) when streams are drawn, by linearisation."""
    streams, ratio = len(parts), parts.sum() / wholes.sum()
    return float(streams / (streams - 1) * ((parts - ratio * wholes) ** 2).sum() / wholes.sum() ** 2)


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's distribution: exact for 1 and 2 degrees of freedom, else by its expansion, within 1 %."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z, v = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
