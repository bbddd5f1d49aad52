"""KVMerger: runs of like neighbours become one token each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond import ops
from millpond.policies.base import Needs, Policy, Shape, View, check_between, check_whole
from millpond.policies.scoring.attention import proxy_attention, proxy_scratch
from millpond.policies.scoring.merging import fold, fold_scratch


@dataclass(frozen=True)
class KVMerger(Policy):
    """Merge runs of neighbouring tokens whose keys are alike, instead of dropping tokens; in each head by itself:

        neighbours i, i + 1 join when cos(k_i, k_i+1) is among the largest, as many as must go;
        of a run, the token with the most attention is the pivot p and stays;
        k_p = sum w_i k_i / sum w_i,  v_p = sum w_i v_i / sum w_i,  w_i = exp(-|k_p - k_i|^2 / (2 s^2)),

    s the mean distance of the run's other tokens from the pivot. Protected tokens and heavy hitters join no run. The published rule
    joins wherever the cosine passes a fixed threshold, which meets no fixed number of tokens: here the number is exact, and
    `threshold` only says which tokens are too unlike their pivot to be averaged in; they are forgotten. Where too few neighbours are
    left to join, those with the least attention go. Attention is that of the latest tokens; keys are merged as they lie in
    the cache, rotary embedding applied. Repeated compactions merge what was merged before, with no memory of its weight.

    Attributes:
        window: latest tokens that ask. Ours, SnapKV's: 32.
        heavy: share of the memory for heavy hitters, which stay as they are. Ours: a quarter.
        threshold: minimum cosine with the pivot. Published: between 0.75 and 0.8.
    """

    name: ClassVar[str] = "kvmerger"
    source: ClassVar[str] = "Wang et al., KVMerger, 2024 (arXiv 2407.08454): notes on the paper"

    window: int = 32
    heavy: float = 0.25
    threshold: float = 0.75

    def __post_init__(self) -> None:
        check_whole(self, 1, "window")
        check_between(self, 0, 1, "heavy")
        check_between(self, -1, 1, "threshold")

    @property
    def needs(self) -> Needs:
        return Needs(proxy="latest", queries=self.window, merging=True)

    def keep(self, view: View, slots: int) -> Tensor:
        keep = torch.empty(view.heads, slots, dtype=torch.int64, device=view.keys.device)
        for head, attention in enumerate(proxy_attention(view, latest=True).nan_to_num_(0)):
            owner = self._runs(view, head, attention, slots)
            stays = owner == torch.arange(view.tokens, device=owner.device)
            if (over := int(stays.sum()) - slots) > 0:
                free = torch.where(stays & ~view.protected[head], attention, torch.inf)
                stays[free.topk(over, largest=False).indices] = False
            keep[head] = stays.nonzero()[:, 0]
        return keep

    def merge(self, view: View, keep: Tensor) -> None:
        for head, attention in enumerate(proxy_attention(view, latest=True).nan_to_num_(0)):
            owner = self._runs(view, head, attention, keep.shape[1])
            stays = torch.zeros(view.tokens, dtype=torch.bool, device=keep.device)
            stays[keep[head]] = True
            own = owner == torch.arange(view.tokens, device=owner.device)
            owner = torch.where(stays[owner], owner, -1)
            apart, alike = ops.distances(view.keys[head], owner, view.chunk)
            others = ((owner >= 0) & ~own).float()
            groups = owner.clamp_min(0)
            count = torch.zeros_like(apart).index_add_(0, groups, others)
            owner = torch.where((count > 0)[groups] & (owner >= 0), owner, -1)  # a token alone is left as it is
            mean = torch.zeros_like(apart).index_add_(0, groups, apart * others) / count.clamp_min(1)
            weight = torch.exp(-((apart / mean[groups].clamp_min(1e-12)) ** 2) / 2)
            weight[(alike < self.threshold) & ~own] = 0
            fold(view, head, owner, weight)

    def _runs(self, view: View, head: int, attention: Tensor, slots: int) -> Tensor:
        """For each token the pivot of its run, int64 [n]; a token that joins no run is its own."""
        fixed, free = view.protected[head].clone(), slots - int(view.protected[head].sum())
        heavy = min(int(self.heavy * slots), max(0, free - 1), int((~fixed).sum()))
        fixed[attention.masked_fill(fixed, -torch.inf).topk(heavy).indices] = True
        after = torch.arange(1, view.tokens + 1, device=attention.device)
        after[-1] = -1
        _, alike = ops.distances(view.keys[head], after, view.chunk)
        alike = alike[:-1].nan_to_num_(-1, -1, -1)
        joinable = ~(fixed[1:] | fixed[:-1])
        joins = min(view.tokens - slots, int(joinable.sum()))
        joined = torch.zeros(view.tokens, dtype=torch.bool, device=attention.device)
        joined[1:][alike.masked_fill(~joinable, -torch.inf).topk(joins).indices] = True
        run = (~joined).cumsum(0) - 1
        best = torch.full((view.tokens,), -torch.inf, device=attention.device)
        best.scatter_reduce_(0, run, attention, "amax")
        # Of equals the oldest.
        order = torch.arange(view.tokens, device=attention.device)
        pivot = torch.full_like(order, view.tokens)
        pivot.scatter_reduce_(0, run, order.masked_fill(attention < best[run], view.tokens), "amin")
        return pivot[run]

    def scratch(self, shape: Shape) -> int:
        # Of one head six vectors of indices beside the ranking: runs, pivots, owners, their order and what is joined.
        runs = 6 * shape.of_head(torch.int64)
        return super().scratch(shape) + runs + max(proxy_scratch(shape), fold_scratch(shape))
