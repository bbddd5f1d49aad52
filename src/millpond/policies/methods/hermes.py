"""HERMES: recency in shallow layers, attention in deep ones, a mix between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import exp
from typing import ClassVar

import torch
from torch import Tensor

from millpond.errors import PolicyError
from millpond.memory.resumable import Steps
from millpond.policies.base import Needs, Scorer, Shape, View, check_between, keep_top
from millpond.policies.scoring.attention import proxy_attention, proxy_scratch
from millpond.policies.scoring.merging import change


@dataclass(frozen=True)
class HERMES(Scorer):
    """Score the tokens of layer l of L by recency and by the chat template's attention, each scaled to 0..1:

        score(i) = (1 - a) * attention(i) + a * recency(i),    recency(i) = exp(-k * d_i),

    d_i from 0 (latest) to 1 (oldest). The first `shallow` share of the layers takes a = 1, the last `deep` share a = 0; between,
    with p running from 0 to 1, a = 0.75 - 0.6 p and k = 20 - 12 p. From the deepest layer up, each one's scores are blended with
    what this gave for the same tokens in the next deeper one:

        blended_l(i) = (1 - g) * score_l(i) + g * blended_l+1(i),

    g = 0.4 in the last `deep` share, 0.1 in the first `shallow` share, 0.3 between. So shallow layers go by recency and a tenth of
    the deeper score.

    The last `deep` share of the layers sum up what they forget: one of their slots goes to the mean of the values of all forgotten
    tokens, and of their keys, rerotated to one position before they are averaged. In the next compaction that token is one like any
    other: it competes by the attention that it gets, and counts as one in the next mean.

    Published: what the authors' programs run. `load_model` of each sets a `shallow` share of 0.1 where the class has 0.3 (LLaVA-OneVision:
    haowei-freesky/HERMES, b505d95; Qwen2.5-VL: as copies of the repository have it). The mix is that of the paper's equation 3 and
    the Qwen program; b505d95 has a = 1 - 0.9 p and k = 20 - 19.5 p. A share is rounded down to whole layers, so that a model of fewer
    than ten layers, such as Minnow with four, has no shallow layer at 0.1: its first one begins the mix.

    Ours: theirs appends the summary behind everything that it keeps, one position further; here no token can be added, so the summary
    takes the slot of the latest token that is forgotten, with its position, time and grid position. A token is blended with itself, in the
    same head; theirs with what lies at the same index of the next layer, stretched where lengths differ, which is another token
    from the second compaction on. A token that the next deeper layer no longer holds keeps its own score, and so do text and
    separators, which cannot be told apart. The chat template's tokens ask for every layer, where the authors run three
    generic questions (and earlier turns of the user, which would not be agnostic); heads choose for themselves, where theirs share
    the mean over heads. The latest frame is protected, theirs competes. Positions are the session's matter (`positions="contiguous"`).

    Attributes:
        shallow: share of the layers whose own score is recency alone. Published: 0.1.
        deep: share of the layers whose own score is attention alone. Published: 0.3.
        recency: weight a where the mix begins. Published: 0.75.
        fade: by how much a falls over the mix. Published: 0.6.
    """

    name: ClassVar[str] = "hermes"
    source: ClassVar[str] = "Zhang et al., HERMES, 2026 (arXiv 2601.14724): code"

    shallow: float = 0.1
    deep: float = 0.3
    recency: float = 0.75
    fade: float = 0.6

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "shallow", "deep", "recency", "fade")
        if self.shallow + self.deep > 1 or self.fade > self.recency:
            raise PolicyError("hermes: shallow + deep must be at most 1, and fade at most recency")

    @property
    def needs(self) -> Needs:
        summing = self.deep > 0
        return Needs(proxy="prompt", deeper_scores=True, merging=summing, positions=summing)

    def keep(self, view: View, slots: int) -> Tensor:
        scores = self.score(view)
        if view.carried_scores is not None:
            view.carried_scores.copy_(scores)
        return self._chosen(view, scores, slots)[0]

    def merge(self, view: View, keep: Tensor) -> None:
        if self._sums_up(view, keep.shape[1]):
            carried = view.carried_scores  # those that chose
            scores = self.score(view) if carried is None else carried.clone()
            summaries = self._chosen(view, scores, keep.shape[1])[1]
            for head, summary in enumerate(summaries.tolist()):
                _sum_up(view, head, keep[head], summary)

    def _chosen(self, view: View, scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """What stays, int64 [H, slots], and which of it becomes the summary, int64 [H]: the latest token that did not earn a slot."""
        if not self._sums_up(view, slots):
            return keep_top(scores, view.protected, slots), scores.new_empty(0, dtype=torch.int64)
        best = keep_top(scores, view.protected, slots - 1)
        gone = torch.ones(view.heads, view.tokens, dtype=torch.bool, device=best.device).scatter_(1, best, False)
        order = torch.arange(view.tokens, dtype=torch.int32, device=best.device)
        summaries = torch.where(gone, order, -1).amax(1).long()
        return torch.cat([best, summaries[:, None]], dim=1).sort(dim=1).values, summaries

    def score(self, view: View) -> Tensor:
        """With its share of the next deeper layer's."""
        weight, steepness, share = self.mix(view.layer, view.layers)
        if weight == 1:
            scores = _recency(view.tokens, steepness, view.keys.device).repeat(view.heads, 1)
        else:
            scores = proxy_attention(view, latest=False)
            for row in scores:
                low = row.min()
                row.sub_(low).div_(row.max() + 1e-6)
                if weight:
                    row.mul_(1 - weight).add_(_recency(view.tokens, steepness, row.device), alpha=weight)
        if view.deeper_scores is not None:
            for row, deeper_scores in zip(scores, view.deeper_scores, strict=True):
                row.lerp_(torch.where(deeper_scores.isnan(), row, deeper_scores), share)
        return scores

    def _sums_up(self, view: View, slots: int) -> bool:
        """In a deep layer, where more fits than what is protected and one token."""
        free = slots - int(view.protected[0].sum())
        return view.layer >= int(view.layers * (1 - self.deep)) and free > 0 and slots > 1

    def mix(self, layer: int, layers: int) -> tuple[float, float, float]:
        """The weight of recency in a layer, how steeply recency falls, and the share of the next deeper layer's score."""
        first, last = int(layers * self.shallow), int(layers * (1 - self.deep))
        if layer < first:
            return 1.0, 20.0, 0.1
        if layer >= last:
            return 0.0, 0.0, 0.4
        progress = (layer - first) / (last - first)
        return self.recency - self.fade * progress, 20 - 12 * progress, 0.3

    def scratch(self, shape: Shape) -> int:
        choosing = super().scratch(shape) + proxy_scratch(shape)
        # The choice, again with the summary, and twice while it is sorted; which tokens go, and their order.
        summary = shape.of_all(torch.int64, torch.int64, torch.int64, torch.int64, torch.bool, torch.int32)
        merging = shape.of_all(torch.float32, torch.int64) + _mean_scratch(shape)
        return max(choosing, summary, merging) + shape.of_all(torch.float32)


def _sum_up(view: View, head: int, keep: Tensor, summary: int) -> None:
    """Make a kept token the mean of itself and of all that is forgotten; keys are rerotated to its position first.

    Keys or values that are not finite numbers count for nothing; where nothing counts, nothing changes.
    """
    if view.positions is None or view.rope is None:
        raise PolicyError("hermes: the view shows no positions to rerotate keys to: only a Session does")
    gone = torch.ones(view.tokens, dtype=torch.bool, device=keep.device)
    gone[keep] = False
    gone[summary] = True
    keys, values, positions = view.keys[head], view.values[head], view.positions[head]
    totals, count = torch.zeros(2, keys.shape[1], device=keys.device), 0
    for part in gone.nonzero()[:, 0].split(max(1, view.chunk)):
        rotated, own = keys[part].float(), values[part].float()
        sound = rotated.isfinite().all(1) & own.isfinite().all(1)
        view.rope.rotate_(rotated, (positions[summary] - positions[part]).long())
        for total, rows in zip(totals, (rotated, own), strict=True):
            total += rows.masked_fill_(~sound[:, None], 0).sum(0)
        count += int(sound.sum())
    if count:
        means = zip((keys, values), totals / count, strict=True)
        change(view, head, Steps([partial(_put, tensor, summary, mean) for tensor, mean in means]))


def _put(rows: Tensor, at: int, row: Tensor) -> None:
    rows[at] = row


def _mean_scratch(shape: Shape) -> int:
    """The most bytes that `_sum_up` allocates: masks, a chunk of keys and values, and what rotates keys (float64 angles and halves)."""
    head_dim = shape.head_dim
    rows = 2 * 4 * head_dim + 2 * head_dim + (3 * 8 + 7 * 4) * head_dim // 2 + 96
    masks = shape.of_head(torch.int64, torch.bool, torch.bool, torch.bool, torch.bool)
    return masks + shape.chunk * rows + 32 * head_dim


def _recency(tokens: int, steepness: float, device: torch.device) -> Tensor:
    """exp(-k d) of every token, scaled to 0..1: float32 [n]."""
    distance = torch.linspace(1, 0, tokens, device=device)
    minimum = exp(-steepness)
    return distance.mul_(-steepness).exp_().sub_(minimum).div_(1 - minimum + 1e-6)
