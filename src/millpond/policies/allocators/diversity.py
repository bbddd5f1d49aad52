"""InfiniteVGGT's layer budgets: by how many directions a layer's keys point in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from millpond.errors import PolicyError
from millpond.ops.similarity import mean_unit_key
from millpond.policies.allocators.base import Allocator
from millpond.policies.base import Shape, View
from millpond.policies.scoring.keys import unit_keys_scratch


@dataclass(frozen=True)
class Diversity(Allocator):
    """More for layers whose keys point in many directions: softmax over the layers of (1 - s_l) / temperature.

    s_l is the mean over heads and tokens of u . mean(u), u the unit keys, which is the squared length of the mean unit key.
    The released program uses the s_l of the pass before; here they are of this one.

    Attributes:
        temperature: published: 0.5.
    """

    name: ClassVar[str] = "diversity"
    source: ClassVar[str] = "Yuan et al., InfiniteVGGT, 2026 (arXiv 2601.02281): code of the budgets"

    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise PolicyError(f"diversity: temperature must be above 0, not {self.temperature!r}")

    def weights(self, views: Iterator[View], skip: Callable[[View], list[int]] | None = None) -> list[float]:
        """As the base; `skip` says how many of each head's first tokens do not count."""
        weights = []
        for view in views:
            firsts = skip(view) if skip is not None else [0] * view.heads
            pairs = zip(view.keys, firsts, strict=True)
            counted = [keys[first:] for keys, first in pairs if first < len(keys)]
            lengths = [float(mean_unit_key(keys, view.chunk).square().sum()) for keys in counted]
            alike = sum(lengths) / max(1, len(lengths))
            weights.append(math.exp((1 - alike) / self.temperature))
        return weights

    def scratch(self, shape: Shape) -> int:
        return unit_keys_scratch(shape)
