"""InfiniPot-V: temporal redundancy of keys (TaR) and norm of values (VaN), with true coordinates in every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from millpond import native
from millpond.errors import PolicyError
from millpond.policies.base import Policy, View, keep_top
from millpond.policies.pooling import pool_over_grid

__all__ = ["InfiniPotV", "temporal_redundancy"]

_NORM_FLOOR = 1e-9


@dataclass(frozen=True)
class InfiniPotV(Policy):
    """Keep what the latest frames do not already show (TaR), then what carries weight (VaN).

    TaR scores a past token by how unlike the latest frames its key is at the same place,

        s(t, i, j) = -1/r * sum over the r recent frames t' of cos(K[t, i, j], K[t', i, j]),

    computed as one dot product with the mean unit key of its place. A share `alpha` of the memory, less the recent frames
    (kept whole), goes to the best of these. VaN scores every token by ||V||, average-pooled over its frame's grid, and
    fills what is left. The pooling kernel follows the layer's coefficient of variation CV = std / mean of the value norms:
    even norms (low CV) mean strong locality and a large kernel.

    Choices where the paper is silent: a place that no recent frame has (the frame size changed) scores 0, neither alike nor
    opposite; text and separators have no place and do not compete in TaR, in VaN they count with their own norm; the average
    is taken over the tokens that exist, so neither borders nor holes of earlier passes weigh it down. The paper's CV
    thresholds are not published; these are ours.

    Attributes:
        alpha: share of the memory for TaR and the recent frames; the rest is VaN's. Published: 0.5.
        recent_share: share of the frames in memory that are kept whole, from the latest back. Published: a quarter.
        pooling: "adaptive" (by CV), or one kernel (1, 3, 5, 7) for every layer; 1 is no pooling.
        thresholds: CV below the first gives kernel 7, below the second 5, below the third 3, else 1.
    """

    name: ClassVar[str] = "infinipot-v"
    source: ClassVar[str] = "Kim et al., InfiniPot-V, NeurIPS 2025 (arXiv 2506.15745): paper and released code"

    alpha: float = 0.5
    recent_share: float = 0.25
    pooling: Literal["adaptive", 1, 3, 5, 7] = "adaptive"
    thresholds: tuple[float, float, float] = (0.2, 0.3, 0.4)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PolicyError(f"infinipot-v: alpha must lie between 0 and 1, not {self.alpha}")
        if not 0 < self.recent_share <= 1:
            raise PolicyError(f"infinipot-v: recent_share must lie above 0 and at most at 1, not {self.recent_share}")
        if self.pooling not in ("adaptive", 1, 3, 5, 7):
            raise PolicyError(f"infinipot-v: pooling must be 'adaptive', 1, 3, 5 or 7, not {self.pooling!r}")
        if len(self.thresholds) != 3 or list(self.thresholds) != sorted(self.thresholds):
            raise PolicyError(f"infinipot-v: thresholds must be three ascending numbers, not {self.thresholds!r}")

    def recent(self, frames: int) -> int:
        return max(1, int(self.recent_share * frames))

    def keep(self, view: View, slots: int) -> Tensor:
        by_value = round((1 - self.alpha) * slots)
        protected = view.protected.clone()
        count = int(protected[0].sum())
        by_redundancy = slots - by_value
        if by_redundancy > count:
            scores = temporal_redundancy(view)
            if count + int((scores[0] > -torch.inf).sum()) < by_redundancy:
                by_redundancy = count + int((scores > -torch.inf).sum(dim=1).min())
            protected.scatter_(1, keep_top(scores, protected, by_redundancy), True)
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
        cv = float(norms.std(correction=0) / norms.mean().clamp(min=1e-12))
        return next((size for size, above in zip((7, 5, 3), self.thresholds, strict=True) if cv < above), 1)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        # [H, n]: scores (float32), marks (bool, twice for a moment) and the kept indices (int64); one head's ranking, or its
        # frames and places (32 bytes a token); the table of mean unit keys (twice) and four float32 chunks of full width.
        return heads * tokens * (4 + 2 + 8) + 32 * tokens + 2 * 4 * head_dim * block + 4 * 4 * chunk * head_dim


def value_norms(view: View) -> Tensor:
    """||V|| of every token: float32 [H, n]."""
    norms = native.norms(view.values)
    if norms is not None:
        return norms
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
    for head in range(view.heads):
        keys, place, recent, out = view.keys[head], view.place[head], view.protected[head], scores[head]
        if native.redundancy(keys, place, recent, _NORM_FLOOR, out):
            continue
        table, index = _mean_unit_keys(view, head)
        for first in range(0, view.tokens, view.chunk):
            rows = keys[first : first + view.chunk].float()
            at = index[first : first + view.chunk]
            dots = torch.linalg.vecdot(rows, table.index_select(0, at.clamp(min=0)))
            dots /= torch.linalg.vector_norm(rows, dim=-1) + _NORM_FLOOR
            out[first : first + view.chunk] = dots.neg_().masked_fill_(at < 0, 0.0)
        out.masked_fill_((place[:, 0] < 0) | recent, -torch.inf)
    return scores


def _mean_unit_keys(view: View, head: int) -> tuple[Tensor, Tensor]:
    """The mean unit key of each place over the recent frames, float32 [p, D], and each token's row in it, int32 [n] (-1: none)."""
    place = view.place[head]
    visual = place[:, 0] >= 0
    recent = (view.protected[head] & visual).nonzero()[:, 0]
    height, width = (place.index_select(0, recent).amax(dim=0) + 1).tolist() if len(recent) else (0, 0)
    outside = ~visual | (place[:, 0] >= height) | (place[:, 1] >= width)
    index = (place[:, 0].to(torch.int32) * width).add_(place[:, 1]).masked_fill_(outside, -1)
    table = torch.zeros(max(1, height * width), view.keys.shape[2], dtype=torch.float32, device=place.device)
    seen = torch.zeros(table.shape[0], dtype=torch.float32, device=place.device)
    for first in range(0, len(recent), view.chunk):
        part = recent[first : first + view.chunk]
        keys = view.keys[head].index_select(0, part).float()
        keys /= torch.linalg.vector_norm(keys, dim=-1, keepdim=True) + _NORM_FLOOR
        at = index.index_select(0, part)
        table.index_add_(0, at, keys)
        seen.index_add_(0, at, torch.ones(len(at), device=place.device))
    table /= seen.clamp(min=1)[:, None]
    unseen = (seen == 0).index_select(0, index.clamp(min=0))
    return table, index.masked_fill_(unseen, -1)
