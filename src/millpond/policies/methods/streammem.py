"""StreamMem: what the chat template's own tokens look at, and one merged token a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import Needs, Policy, Shape, View, check_between, keep_top
from millpond.policies.scoring.attention import proxy_attention, proxy_scratch
from millpond.policies.scoring.merging import fold, fold_scratch


@dataclass(frozen=True)
class StreamMem(Policy):
    """Keep the tokens that the chat template's own tokens behind the video attend to most, in each head:

        score(i) = mean over the template's queries q and the group's heads of softmax(q k_i / sqrt(D)),

    and of every frame one prototype: of the tokens that it keeps the weakest takes in those that it loses, as their mean weighted by
    their scores. So that frames keep one, up to the share `prototypes` of the memory goes to the best tokens of frames that would keep
    none (both rules are ours). The template runs without a question, for each compaction anew, and leaves no trace. It is what a
    model asks when it is about to describe what it saw. Keys are averaged as they lie in the cache, rotary embedding applied. Not
    here: the filter of like frames before the vision tower.

    Attributes:
        prototypes: most of the memory that goes to frames which would keep nothing. Ours: a half.
    """

    name: ClassVar[str] = "streammem"
    source: ClassVar[str] = "Yang et al., StreamMem, 2025 (arXiv 2508.15717): notes on the paper"
    needs: ClassVar[Needs] = Needs(proxy="prompt", merging=True)

    prototypes: float = 0.5

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "prototypes")

    def keep(self, view: View, slots: int) -> Tensor:
        scores = proxy_attention(view, latest=False).nan_to_num_(0)
        free = min(int(self.prototypes * slots), slots - int(view.protected[0].sum()))
        keep = keep_top(scores.clone(), view.protected, slots)
        must = view.protected.clone()
        for head in range(view.heads):
            best = _best_of_the_lost(view.time_us[head], scores[head], keep[head])
            must[head, best[scores[head, best].topk(min(free, len(best))).indices]] = True
        return keep_top(scores, must, slots)

    def merge(self, view: View, keep: Tensor) -> None:
        for head, attention in enumerate(proxy_attention(view, latest=False).nan_to_num_(0)):
            times, group = view.time_us[head].unique_consecutive(return_inverse=True)
            stays = torch.zeros(view.tokens, dtype=torch.bool, device=keep.device)
            stays[keep[head]] = True
            losing = torch.zeros(len(times), dtype=torch.int32, device=keep.device)
            losing.index_add_(0, group, (~stays).int())
            free = stays & ~view.protected[head] & (losing > 0)[group]
            weakest = _extreme(attention, free, group, len(times), largest=False)
            owner = weakest[group]
            order = torch.arange(view.tokens, device=keep.device)
            fold(view, head, torch.where((owner >= 0) & (~stays | (order == owner)), owner, -1), attention)

    def scratch(self, shape: Shape) -> int:
        # Beside the second choice the first one, with scores of its own, and two masks; one head's frames and their best.
        first = shape.of_all(torch.float32, torch.int64, torch.bool, torch.bool)
        frames = shape.of_head(torch.int64, torch.int64)
        return super().scratch(shape) + first + frames + max(proxy_scratch(shape), fold_scratch(shape))


def _best_of_the_lost(time_us: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
    """The best token of each frame that keeps none: int64, ascending."""
    times, group = time_us.unique_consecutive(return_inverse=True)
    kept = torch.zeros(len(times), dtype=torch.bool, device=scores.device)
    kept[group[keep]] = True
    best = _extreme(scores, ~kept[group], group, len(times), largest=True)
    return best[best >= 0]


def _extreme(scores: Tensor, among: Tensor, group: Tensor, groups: int, *, largest: bool) -> Tensor:
    """Of each group the token with the largest (or least) score among some, the oldest of equals: int64 [groups], -1 for none."""
    worst = -torch.inf if largest else torch.inf
    masked = scores.masked_fill(~among, worst)
    best = torch.full((groups,), worst, device=scores.device)
    best.scatter_reduce_(0, group, masked, "amax" if largest else "amin")
    order = torch.arange(len(scores), device=scores.device)
    found = torch.full((groups,), len(scores), dtype=torch.int64, device=scores.device)
    found.scatter_reduce_(0, group, order.masked_fill(~among | (masked != best[group]), len(scores)), "amin")
    return found.masked_fill_(found == len(scores), -1)
