"""A random choice of tokens: the baseline that a policy must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import Policy, View, keep_top

__all__ = ["RandomTokens"]

_LAYERS = 1009  # a prime above any model's number of layers keeps the seeds of layers apart


@dataclass(frozen=True)
class RandomTokens(Policy):
    """Keep tokens at random, independently in every head, layer and pass; the same stream and seed give the same choice.

    Attributes:
        seed: of the generator, together with the layer and the newest token's time.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "the usual baseline"

    seed: int = 0

    def keep(self, view: View, slots: int) -> Tensor:
        newest = int(view.time_us[0, -1])
        generator = torch.Generator().manual_seed((newest * _LAYERS + view.layer) * 31 + self.seed)
        scores = torch.rand(view.heads, view.tokens, generator=generator).to(view.keys.device)
        return keep_top(scores, view.protected, slots)
