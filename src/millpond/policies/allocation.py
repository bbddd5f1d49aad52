"""Layer budgets: how many of the memory's tokens each layer keeps. Combines with any policy; never sees the tokens it grants.

Within a layer every head keeps equally many. The sum over the layers is exact: what one layer gains another gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from millpond.errors import PolicyError
from millpond.ops.similarity import mean_unit_key
from millpond.plugins import Plugins
from millpond.policies.attention import attention_scratch, attention_spread
from millpond.policies.base import LAYER_SHARE, Policy, View

__all__ = ["ALLOCATORS", "Allocator", "Cake", "Diversity", "Layered", "apportion"]


@dataclass(frozen=True)
class Allocator(ABC):
    """Base of all allocators: a frozen dataclass whose fields are the method's parameters."""

    name: ClassVar[str]
    source: ClassVar[str]
    proxy: ClassVar[Literal["latest"] | None] = None
    """As `Policy.proxy`: whose queries the views must show. A policy that has a proxy of its own shows that one's."""

    @property
    def queries(self) -> int:
        """The most tokens whose queries are kept for the proxy."""
        return 0

    @abstractmethod
    def weights(self, views: Iterator[View]) -> list[float]:
        """The layers' shares before a compaction, in any unit; `views` gives one layer at a time, in order."""

    @abstractmethod
    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        """Upper bound in bytes of what `weights` allocates at any instant, views aside."""


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
            lengths = [
                float(mean_unit_key(keys[first:], view.chunk).square().sum())
                for keys, first in zip(view.keys, firsts, strict=True)
                if first < len(keys)
            ]
            alike = sum(lengths) / max(1, len(lengths))
            weights.append(math.exp((1 - alike) / self.temperature))
        return weights

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        return 4 * (2 * chunk + 4) * (head_dim + 2)


@dataclass(frozen=True)
class Cake(Allocator):
    """More for layers whose attention is wide and changes: H^(1/tau1) * V^(1/tau2).

    H is the entropy of the latest tokens' attention on all tokens before them, V the variance of that attention over them.
    The paper cascades: each layer of a prompt's prefill cuts the earlier ones anew. Here all layers are there at once. Its own
    clamping loses the total; here the total is exact.

    Attributes:
        window: latest tokens that ask. Published: 32.
        tau1, tau2: temperatures. Published: tuned for each model and size; 1 where there is no such value.
    """

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = "Qin et al., CAKE, ICLR 2025 (arXiv 2503.12491): code of the layers' preference"
    proxy: ClassVar[Literal["latest"]] = "latest"

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 2:
            raise PolicyError(f"cake: window must be a whole number of tokens, at least 2, not {self.window!r}")
        if not (self.tau1 > 0 and self.tau2 > 0):
            raise PolicyError(f"cake: tau1 and tau2 must be above 0, not {self.tau1!r} and {self.tau2!r}")

    @property
    def queries(self) -> int:
        return self.window

    def weights(self, views: Iterator[View]) -> list[float]:
        spreads = [attention_spread(view) for view in views]
        return [max(0.0, entropy) ** (1 / self.tau1) * variance ** (1 / self.tau2) for entropy, variance in spreads]

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        return attention_scratch(max(chunk, self.window), head_dim, chunk) + 16 * tokens  # where the window lies


@dataclass(frozen=True)
class Layered(Policy):
    """A policy whose layers keep as many tokens as an allocator grants them: `policy+allocator` by name.

    Attributes:
        scorer: chooses within a layer. allocator: shares the memory out between the layers.
    """

    scorer: Policy
    allocator: Allocator

    def __post_init__(self) -> None:
        packs = getattr(self.scorer, "tier", None) is not None  # a low-bit tier goes with equal layers only
        spills = self.scorer.retrieved_frames > 0  # frames leave all layers at once
        if packs or spills or not self.scorer.capped or self.scorer.whole_frames or self.scorer.layer_share > 1:
            raise PolicyError(f"the policy {self.scorer.name!r} cannot be given layer budgets")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.scorer.name}+{self.allocator.name}"

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"{self.scorer.source}; {self.allocator.source}"

    @property
    def agnostic(self) -> bool:  # type: ignore[override]
        return self.scorer.agnostic

    @property
    def proxy(self) -> Any:  # type: ignore[override]
        return self.scorer.proxy or self.allocator.proxy

    @property
    def accumulated_attention(self) -> bool:  # type: ignore[override]
        return self.scorer.accumulated_attention

    @property
    def deepest_first(self) -> bool:  # type: ignore[override]
        return self.scorer.deepest_first

    @property
    def queries(self) -> int:
        return self.scorer.queries if self.scorer.proxy else self.allocator.queries

    @property
    def layer_share(self) -> float:
        return LAYER_SHARE

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        return self.allocator.weights(views)

    def keep(self, view: View, slots: int) -> Tensor:
        return self.scorer.keep(view, slots)

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.scorer.merges

    def merge(self, view: View, keep: Tensor) -> None:
        self.scorer.merge(view, keep)

    def recent(self, frames: int) -> int:
        return self.scorer.recent(frames)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        shape = heads, tokens, head_dim, block, chunk
        return max(self.scorer.scratch(*shape), self.allocator.scratch(*shape))


def apportion(total: int, weights: Sequence[float], minimum: Sequence[int], most: Sequence[int]) -> list[int]:
    """Share `total` out in proportion to the weights, in whole numbers within bounds.

    Weights that are not numbers, or not positive, count as next to nothing; if none is left, all are equal.

    Returns:
        int a weight, least <= share <= most, with the sum min(total, sum of most) exactly.

    Raises:
        PolicyError: not even the least fit, or the counts differ.
    """
    if not len(weights) == len(minimum) == len(most):
        raise PolicyError(f"there are {len(weights)} layer budgets for {len(minimum)} layers")
    total = min(total, sum(most))
    if sum(minimum) > total:
        raise PolicyError(f"{sum(minimum)} tokens must stay, and there is room for {total}")
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


ALLOCATORS: Plugins[Allocator] = Plugins("millpond.allocators", Allocator, "allocator")  # type: ignore[type-abstract]
