"""HERMES: recency in shallow layers, attention in deep ones, a mix between. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import ClassVar, Literal

import torch
from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.attention import attention_scratch, proxy_attention
from millpond.policies.base import Policy, View, check_between, keep_top
from millpond.policies.merging import fold, fold_scratch

__all__ = ["HERMES"]


@dataclass(frozen=True)
class HERMES(Policy):
    """Score the tokens of layer l of L by recency and by the chat template's attention, each scaled to 0..1:

        score(i) = (1 - a) * attention(i) + a * recency(i),    recency(i) = exp(-k * d_i),

    d_i from 0 (latest) to 1 (oldest). The first `shallow` share of the layers takes a = 1, the last `deep` share a = 0; between,
    with p running from 0 to 1, a = 0.75 - 0.6 p and k = 20 - 12 p. From the deepest layer up, each one's scores are blended with
    what this gave for the same tokens in the next deeper one:

        blended_l(i) = (1 - g) * score_l(i) + g * blended_l+1(i),

    g = 0.4 in the last `deep` share, 0.1 in the first `shallow` share, 0.3 between. So shallow layers go by recency and a tenth of
    the deeper score.

    The last `deep` share of the layers fold what they forget into their oldest token, which stays: key and value become the mean over
    both, rotary embedding applied; each compaction folds on, with no memory of how many tokens the mean stands for.

    Ours: a token is blended with itself, in the same head; theirs with what lies at the same index of the next layer, stretched
    where lengths differ, which is another token from the second compaction on. A token that the next deeper layer no longer holds
    keeps its own score, and so do text and separators, which have no place to know them by. The chat template's tokens ask for every
    layer, where the authors run three generic questions (and earlier turns of the user, which would not be agnostic); heads choose
    for themselves, where theirs share the mean over heads. Positions are the session's matter (`positions="contiguous"`).

    Attributes:
        shallow: share of the layers whose own score is recency alone. Published: 0.3.
        deep: share of the layers whose own score is attention alone. Published: 0.3.
        recency: weight a where the mix begins. Published: 0.75.
        fade: by how much a falls over the mix. Published: 0.6.
    """

    name: ClassVar[str] = "hermes"
    source: ClassVar[str] = "Zhang et al., HERMES, 2026 (arXiv 2601.14724): code, by its later version"
    proxy: ClassVar[Literal["prompt"]] = "prompt"
    merges: ClassVar[bool] = True
    deepest_first: ClassVar[bool] = True

    shallow: float = 0.3
    deep: float = 0.3
    recency: float = 0.75
    fade: float = 0.6

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "shallow", "deep", "recency", "fade")
        if self.shallow + self.deep > 1 or self.fade > self.recency:
            raise PolicyError("hermes: shallow + deep must be at most 1, and fade at most recency")

    def keep(self, view: View, slots: int) -> Tensor:
        scores = self._blended(view)
        if view.carry is not None:
            view.carry.copy_(scores)
        must = view.protected
        if self._folds(view) and int(must[0].sum()) < slots:
            must = must.clone()
            must[:, 0] = True
        return keep_top(scores, must, slots)

    def merge(self, view: View, keep: Tensor) -> None:
        if not self._folds(view):
            return
        for head in range(view.heads):
            if int(keep[head, 0]) != 0:
                continue  # room for nothing but what is protected
            owner = torch.zeros(view.tokens, dtype=torch.int64, device=keep.device)
            owner[keep[head, 1:]] = -1
            fold(view, head, owner, torch.ones(view.tokens, device=keep.device))

    def _blended(self, view: View) -> Tensor:
        """Every token's score, with its share of the next deeper layer's: float32 [H, n]."""
        weight, steepness, share = self.mix(view.layer, view.layers)
        if weight == 1:
            scores = _recency(view.tokens, steepness, view.keys.device).repeat(view.heads, 1)
        else:
            scores = proxy_attention(view)
            for row in scores:
                low = row.min()
                row.sub_(low).div_(row.max() + 1e-6)
                if weight:
                    row.mul_(1 - weight).add_(_recency(view.tokens, steepness, row.device), alpha=weight)
        if view.deeper is not None:
            for row, deeper in zip(scores, view.deeper, strict=True):
                row.lerp_(torch.where(deeper.isnan(), row, deeper), share)
        return scores

    def _folds(self, view: View) -> bool:
        """In a deep layer, unless its oldest token is protected."""
        return view.layer >= int(view.layers * (1 - self.deep)) and not bool(view.protected[:, 0].any())

    def mix(self, layer: int, layers: int) -> tuple[float, float, float]:
        """The weight of recency in a layer, how steeply recency falls, and the share of the next deeper layer's score."""
        first, last = int(layers * self.shallow), int(layers * (1 - self.deep))
        if layer < first:
            return 1.0, 20.0, 0.1
        if layer >= last:
            return 0.0, 0.0, 0.4
        progress = (layer - first) / (last - first)
        return self.recency - self.fade * progress, 20 - 12 * progress, 0.3

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        choice = super().scratch(heads, tokens, head_dim, block, chunk) + attention_scratch(chunk, head_dim, chunk)
        return max(choice, 8 * heads * tokens + fold_scratch(tokens, head_dim, chunk)) + 2 * heads * tokens


def _recency(tokens: int, steepness: float, device: torch.device) -> Tensor:
    """exp(-k d) of every token, scaled to 0..1: float32 [n]."""
    distance = torch.linspace(1, 0, tokens, device=device)
    least = exp(-steepness)
    return distance.mul_(-steepness).exp_().sub_(least).div_(1 - least + 1e-6)
