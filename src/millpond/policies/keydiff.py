"""KeyDiff: the keys that point least in the common direction. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from millpond import native
from millpond.policies.base import Policy, View, keep_top

__all__ = ["KeyDiff", "distinctiveness", "mean_unit_key"]


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keep the most distinctive keys: score(i) = -cos(k_i, mean over j of k_j / ||k_j||), in each head by itself.

    Keys are scored as they lie in the cache, rotary embedding applied. The mean runs over the whole memory, what is protected
    included. There are no parameters.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "Park et al., KeyDiff, 2025 (arXiv 2504.15364): notes on the paper and on code"

    def keep(self, view: View, slots: int) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, device=view.keys.device)
        for keys, row in zip(view.keys, scores, strict=True):
            distinctiveness(keys, view.chunk, row)
        return keep_top(scores, view.protected, slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        # Beside the scores and their ranking: a chunk in float32 and its unit keys, with norms; the mean key and its parts.
        return super().scratch(heads, tokens, head_dim, block, chunk) + 4 * (2 * chunk + 4) * (head_dim + 2)


def distinctiveness(keys: Tensor, chunk: int, out: Tensor) -> None:
    """Write -cos(k, mean of the unit keys) of one head's keys [n, D] to `out`, float32 [n]; `chunk` keys at a time."""
    if native.distinctiveness(keys, out):
        return
    common = normalize(mean_unit_key(keys, chunk), dim=0)
    for part, score in zip(keys.split(chunk), out.split(chunk), strict=True):
        score.copy_(normalize(part.float(), dim=1) @ common).neg_()


def mean_unit_key(keys: Tensor, chunk: int) -> Tensor:
    """The mean of k / ||k|| over one head's keys [n, D]: float32 [D]; `chunk` keys at a time."""
    total = torch.zeros(keys.shape[1], device=keys.device)
    for part in keys.split(chunk):
        total += normalize(part.float(), dim=1).sum(0)
    return total / len(keys)
