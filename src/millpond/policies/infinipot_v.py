"""InfiniPot-V: temporal redundancy of keys (TaR) and norm of values (VaN), with true coordinates in every pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from millpond import native
from millpond.errors import PolicyError
from millpond.policies.base import Policy, View, check_between, keep_top
from millpond.policies.pooling import pool_over_grid

__all__ = ["InfiniPotV", "temporal_redundancy"]

_NORM_FLOOR = 1e-9


@dataclass(frozen=True)
class InfiniPotV(Policy):
    """Keep what the latest frames do not already show (TaR), then what carries weight (VaN).

    TaR scores a past token by how unlike the latest frames its key is at the same place,

        s(t, i, j) = -1/r * sum over the r recent frames t' of cos(K[t, i, j], K[t', i, j]),

    computed as one dot product with the mean unit key of its place. `tar_first` frame groups and a share `alpha` of what is left of
    the memory, less the recent frames (kept whole), go to the best of these. VaN scores every token by ||V||, average-pooled over its frame's grid, and
    fills what is left. The pooling kernel follows the layer's coefficient of variation CV = std / mean of the value norms:
    even norms (low CV) mean strong locality and a large kernel.

    Choices where the paper is silent: a place that no recent frame has (the frame size changed) scores 0, neither alike nor
    opposite; text and separators have no place and do not compete in TaR, in VaN they count with their own norm; the average
    is taken over the tokens that exist, so neither borders nor holes of earlier passes weigh it down. The paper's CV
    thresholds are not published; these are ours.

    Attributes:
        alpha: share for TaR and the recent frames of what `tar_first` leaves; the rest is VaN's. Published: 0.5.
        tar_first: frame groups of the memory, |C| / p, that are TaR's and the recent frames' before alpha divides the rest: of a memory
            of F groups VaN gets (1 - alpha) (1 - tar_first / F), in the limit of large memories the published 1 - alpha. Published: 0,
            which leaves TaR next to nothing in memories of a few groups, where the recent one has to be paid first. Ours: 1.5, chosen on
            validation streams (docs/accuracy/small-memories.md).
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
        by_redundancy = slots - self.by_value(slots, view.block)
        kernel = 0 if self.pooling == "adaptive" else self.pooling
        keep = native.infinipot_v(view, by_redundancy, slots, kernel, self.thresholds, _NORM_FLOOR)
        return self._keep(view, by_redundancy, slots) if keep is None else keep

    def by_value(self, slots: int, group: int) -> int:
        """Tokens of each head that VaN chooses, of `slots` in all, with `group` tokens a frame group."""
        return round((1 - self.alpha) * max(0.0, slots - self.tar_first * group))

    def _keep(self, view: View, by_redundancy: int, slots: int) -> Tensor:
        """What the compiled selection does, in torch."""
        protected = view.protected.clone()
        if by_redundancy > int(protected[0].sum()):
            scores = temporal_redundancy(view)
            protected.scatter_(1, keep_top(scores, protected, by_redundancy), True)
            # A head with too few placed tokens was filled up with text, which does not compete here.
            protected &= scores > -torch.inf
            del scores
        norms = value_norms(view)
        kernel = self.kernel(norms)
        if kernel > 1:
            pool_over_grid(norms, view, kernel)
        return keep_top(norms, protected, slots)

    def kernel(self, norms: Tensor) -> int:
        """The pooling kernel of a layer with these value norms, float32 [H, n]."""
        if self.pooling != "adaptive":
            return self.pooling
        mean = float(norms.mean())
        variance = float(torch.linalg.vector_norm(norms)) ** 2 / norms.numel() - mean**2
        cv = max(0.0, variance) ** 0.5 / max(mean, 1e-12)
        return next((size for size, above in zip((7, 5, 3), self.thresholds, strict=True) if cv < above), 1)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        # [H, n]: scores (float32), marks (bool, twice for a moment) and the kept indices (int64); one head's ranking, or its
        # frames and places (32 bytes a token); the table of mean unit keys, and four float32 chunks of full width.
        table = 4 * (head_dim + 1) * max(block, chunk)
        return heads * tokens * (4 + 2 + 8) + 32 * tokens + table + 4 * 4 * chunk * head_dim


def value_norms(view: View) -> Tensor:
    """||V|| of every token: float32 [H, n]."""
    norms = torch.empty(view.heads, view.tokens, dtype=torch.float32, device=view.values.device)
    for head in range(view.heads):
        for first in range(0, view.tokens, view.chunk):
            rows = view.values[head, first : first + view.chunk].float()
            norms[head, first : first + view.chunk] = torch.linalg.vector_norm(rows, dim=-1)
    return norms


def temporal_redundancy(view: View) -> Tensor:
    """TaR of every token: float32 [H, n]; -inf for protected tokens and those without a place.

    The mean over r frames of cos(k, k') at one place is (k / ||k||) . mean(k' / ||k'||): one dot product a token, and a table
    of one vector a place instead of an r x f x p x D intermediate.
    """
    scores = torch.empty(view.heads, view.tokens, dtype=torch.float32, device=view.keys.device)
    # One round does unless the recent frames differ in size and no table of one frame's places covers them.
    span = max(1, view.block, view.chunk)
    for head in range(view.heads):
        keys, grid_position, recent, out = view.keys[head], view.grid_position[head], view.protected[head], scores[head]
        _redundancy_of_head(keys, grid_position, recent, view.chunk, span, out)
    return scores


def _redundancy_of_head(
    keys: Tensor, grid_position: Tensor, recent: Tensor, chunk: int, span: int, out: Tensor
) -> None:
    """Of one head; `span` places at a time."""
    visual = grid_position[:, 0] >= 0
    latest = (recent & visual).nonzero()[:, 0]
    height, head_dim = (grid_position.index_select(0, latest).amax(dim=0) + 1).tolist() if len(latest) else (0, 0)
    outside = ~visual | (grid_position[:, 0] >= height) | (grid_position[:, 1] >= head_dim)
    index = (grid_position[:, 0].to(torch.int32) * head_dim).add_(grid_position[:, 1]).masked_fill_(outside, -1)
    out.zero_()
    for base in range(0, height * head_dim, span):
        table, seen = _mean_unit_keys(keys, latest, index, base, span, chunk)
        for first in range(0, len(keys), chunk):
            at = index[first : first + chunk] - base
            shown = (at >= 0) & (at < span)
            at.masked_fill_(~shown, 0)
            shown &= seen.index_select(0, at) > 0
            rows = keys[first : first + chunk].float()
            dots = torch.linalg.vecdot(rows, table.index_select(0, at))
            dots /= torch.linalg.vector_norm(rows, dim=-1) + _NORM_FLOOR
            part = out[first : first + chunk]
            part.copy_(torch.where(shown, dots.neg_(), part))
    out.masked_fill_(~visual | recent, -torch.inf)


def _mean_unit_keys(
    keys: Tensor, latest: Tensor, index: Tensor, base: int, span: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The mean unit key of the places base... over the recent frames, float32 [span, D], and how many show each, [span]."""
    table = torch.zeros(span, keys.shape[1], dtype=torch.float32, device=keys.device)
    seen = torch.zeros(span, dtype=torch.float32, device=keys.device)
    for first in range(0, len(latest), chunk):
        part = latest[first : first + chunk]
        at = index.index_select(0, part) - base
        inside = (at >= 0) & (at < span)
        part, at = part[inside], at[inside]
        rows = keys.index_select(0, part).float()
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + _NORM_FLOOR
        table.index_add_(0, at, rows)
        seen.index_add_(0, at, torch.ones(len(at), device=keys.device))
    table /= seen.clamp(min=1)[:, None]
    return table, seen
