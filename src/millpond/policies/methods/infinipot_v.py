"""InfiniPot-V: temporal redundancy of keys (TaR) and norm of values (VaN), with true coordinates in every pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from millpond import ops
from millpond.errors import PolicyError
from millpond.policies.base import Policy, Shape, View, check_between


@dataclass(frozen=True)
class InfiniPotV(Policy):
    """Keep what the latest frames do not already show (TaR), then what carries weight (VaN).

    TaR scores a past token by how unlike the latest frames its key is at the same grid position,

        s(t, i, j) = -1/r * sum over the r recent frames t' of cos(K[t, i, j], K[t', i, j]),

    computed as one dot product with the mean unit key of its position. `tar_first` frame groups and a share `alpha` of what is left of
    the memory, less the recent frames (kept whole), go to the best of these. VaN scores every token by ||V||, average-pooled over its frame's grid, and
    fills what is left. The pooling kernel follows the layer's coefficient of variation CV = std / mean of the value norms:
    even norms (low CV) mean strong locality and a large kernel.

    Choices where the paper is silent: a position that no recent frame has (the frame size changed) scores 0, neither alike nor
    opposite; text and separators have no grid position and do not compete in TaR, in VaN they count with their own norm; the average
    is taken over the tokens that exist, so neither borders nor holes of earlier passes weigh it down. The paper's CV
    thresholds are not published; these are ours.

    Attributes:
        alpha: share for TaR and the recent frames of what `tar_first` leaves; the rest is VaN's. Published: 0.5.
        tar_first: frame groups of the memory, |C| / p, that are TaR's and the recent frames' before alpha divides the rest: of a memory
            of F groups VaN gets (1 - alpha) (1 - tar_first / F), in the limit of large memories the published 1 - alpha. Published: 0,
            which leaves TaR next to nothing in memories of a few groups, where the recent one has to be paid first. Ours: 1.5, chosen on
            validation streams (docs/accuracy.md).
        recent_share: share of the frames in memory that are kept whole, from the latest back. Published: a quarter.
        pooling: "adaptive" (by CV), or one kernel (1, 3, 5, 7) for every layer; 1 is no pooling.
        thresholds: CV below the first gives kernel 7, below the second 5, below the third 3, else 1.
    """

    name: ClassVar[str] = "infinipot-v"
    source: ClassVar[str] = "Kim et al., InfiniPot-V, NeurIPS 2025 (arXiv 2506.15745): paper and released code"

    alpha: float = 0.5
    tar_first: float = 1.5
    recent_share: float = 0.25
    pooling: Literal["adaptive", 1, 3, 5, 7] = "adaptive"
    thresholds: tuple[float, float, float] = (0.2, 0.3, 0.4)

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "alpha")
        check_between(self, 0, math.inf, "tar_first")
        if not 0 < self.recent_share <= 1:
            raise PolicyError(f"infinipot-v: recent_share must lie above 0 and at most at 1, not {self.recent_share}")
        if self.pooling not in ("adaptive", 1, 3, 5, 7):
            raise PolicyError(f"infinipot-v: pooling must be 'adaptive', 1, 3, 5 or 7, not {self.pooling!r}")
        if len(self.thresholds) != 3 or list(self.thresholds) != sorted(self.thresholds):
            raise PolicyError(f"infinipot-v: thresholds must be three ascending numbers, not {self.thresholds!r}")

    def recent(self, frames: int) -> int:
        return max(1, int(self.recent_share * frames))

    def keep(self, view: View, slots: int) -> Tensor:
        return ops.infinipot_v_selection(
            view.keys,
            view.values,
            view.time_us,
            view.grid_position,
            view.protected,
            by_redundancy=slots - self.by_value(slots, view.block),
            slots=slots,
            thresholds=self.thresholds,
            pooling=None if self.pooling == "adaptive" else self.pooling,
            chunk=view.chunk,
            span=max(1, view.block, view.chunk),
        )

    def by_value(self, slots: int, group: int) -> int:
        """Tokens of each head that VaN chooses, of `slots` in all, with `group` tokens a frame group."""
        return round((1 - self.alpha) * max(0.0, slots - self.tar_first * group))

    def scratch(self, shape: Shape) -> int:
        # Frames and grid positions of one head, when they are pooled, take no more than the ranking.
        marks = shape.of_all(torch.bool, torch.bool)
        return super().scratch(shape) + marks + _redundancy_scratch(shape)


def _redundancy_scratch(shape: Shape) -> int:
    """The most bytes that temporal redundancy takes for a head: the table of mean unit keys, and four float32 chunks [chunk, D]."""
    table = 4 * (shape.head_dim + 1) * max(shape.block, shape.chunk)
    return table + 4 * 4 * shape.chunk * shape.head_dim
