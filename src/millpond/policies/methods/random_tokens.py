"""A random choice of tokens: the baseline that a policy must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Scorer, View


@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Keep tokens at random, independently in every head, layer and pass; the same stream and seed give the same choice.

    Attributes:
        seed: of the generator, together with the layer and the newest token's time.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "the usual baseline"

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise PolicyError(f"random: seed must be a whole number, not {self.seed!r}")

    def score(self, view: View) -> Tensor:
        # A hash, so that no two of seed, layer and pass can stand in for one another, and times of any size will do.
        drawn = f"{self.seed} {view.layer} {int(view.time_us[0, -1])}".encode()
        state = int.from_bytes(hashlib.blake2b(drawn, digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(state)
        return torch.rand(view.heads, view.tokens, generator=generator).to(view.keys.device)
