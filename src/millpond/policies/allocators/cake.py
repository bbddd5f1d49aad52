"""CAKE's layer budgets: by how wide and how changing a layer's attention is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from millpond.errors import PolicyError
from millpond.policies.allocators.base import Allocator
from millpond.policies.base import Needs, Shape, View, check_whole
from millpond.policies.scoring.attention import attention_spread, spread_scratch


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

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self, 2, "window")
        if not (self.tau1 > 0 and self.tau2 > 0):
            raise PolicyError(f"cake: tau1 and tau2 must be above 0, not {self.tau1!r} and {self.tau2!r}")

    @property
    def needs(self) -> Needs:
        return Needs(proxy="latest", queries=self.window)

    def weights(self, views: Iterator[View]) -> list[float]:
        spreads = [attention_spread(view) for view in views]
        return [max(0.0, entropy) ** (1 / self.tau1) * variance ** (1 / self.tau2) for entropy, variance in spreads]

    def scratch(self, shape: Shape) -> int:
        return spread_scratch(shape, self.window)
