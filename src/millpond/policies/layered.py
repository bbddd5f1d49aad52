"""A policy with layer budgets: an allocator shares the memory out between the layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from millpond.policies.allocators.base import Allocator
from millpond.policies.base import LAYER_SHARE, Needs, Policy, Shape, View
from millpond.policies.composition import LAYER_BUDGETS, Wrapper


@dataclass(frozen=True)
class Layered(Wrapper):
    """A policy whose layers keep as many tokens as an allocator grants them: `policy+allocator` by name.

    Attributes:
        scorer: chooses within a layer. allocator: shares the memory out between the layers.
    """

    adds: ClassVar[str] = LAYER_BUDGETS

    scorer: Policy
    allocator: Allocator

    @property
    def inner(self) -> Policy:
        return self.scorer

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.scorer.name}+{self.allocator.name}"

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"{self.scorer.source}; {self.allocator.source}"

    @property
    def needs(self) -> Needs:
        needs = replace(self.scorer.needs, layer_share=LAYER_SHARE)
        if needs.proxy is None:
            theirs = self.allocator.needs
            needs = replace(needs, proxy=theirs.proxy, queries=theirs.queries)
        return needs

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        return self.allocator.weights(views)

    def scratch(self, shape: Shape) -> int:
        return max(self.scorer.scratch(shape), self.allocator.scratch(shape))
