"""The contract of an allocator: how many of the memory's tokens each layer keeps. It never sees the tokens that it grants.

Within a layer every head keeps equally many. The sum over the layers is exact: what one layer gains another gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from millpond.errors import PolicyError
from millpond.policies.base import Needs, Shape, View


@dataclass(frozen=True)
class Allocator(ABC):
    """Base of all allocators: a frozen dataclass whose fields are the method's parameters."""

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """The proxy whose queries the views must show, if any. A policy that has a proxy of its own shows that one's."""
        return Needs()

    @abstractmethod
    def weights(self, views: Iterator[View]) -> list[float]:
        """The layers' shares before a compaction, in any unit; `views` gives one layer at a time, in order."""

    @abstractmethod
    def scratch(self, shape: Shape) -> int:
        """Upper bound in bytes of what `weights` allocates at any instant, views aside."""


def apportion(total: int, weights: Sequence[float], minimum: Sequence[int], most: Sequence[int]) -> list[int]:
    """Share `total` out in proportion to the weights, in whole numbers within bounds.

    Weights that are not numbers, or not positive, count as next to nothing; if none is left, all are equal.

    Returns:
        int a weight, minimum <= share <= most, with the sum min(total, sum of most) exactly.

    Raises:
        PolicyError: not even the minimum fits, or the counts differ.
    """
    if not len(weights) == len(minimum) == len(most):
        raise PolicyError(f"there are {len(weights)} layer budgets for {len(minimum)} layers")
    total = min(total, sum(most))
    if sum(minimum) > total:
        raise PolicyError(f"{sum(minimum)} tokens must stay, and {total} fit")
    known = [weight if 0 < weight < math.inf else 0.0 for weight in weights]
    peak = max(known)
    shares = [max(weight / peak, 1e-9) for weight in known] if peak else [1.0] * len(known)

    def bounded(scale: float) -> list[float]:
        return [min(max(scale * share, low), high) for share, low, high in zip(shares, minimum, most, strict=True)]

    below, above = 0.0, 1e10 * (total + 1)
    for _ in range(200):
        middle = (below + above) / 2
        if sum(bounded(middle)) <= total:
            below = middle
        else:
            above = middle
    exact = bounded(below)
    granted = [int(share) for share in exact]
    # What rounding down left over goes to the largest remainders, the earlier layer first.
    order = sorted(range(len(exact)), key=lambda at: granted[at] - exact[at])
    while (left := total - sum(granted)) > 0:
        for at in [at for at in order if granted[at] < most[at]][:left]:
            granted[at] += 1
    return granted
