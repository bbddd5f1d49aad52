"""KeyDiff: the keys that point least in the common direction. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond import ops
from millpond.policies.base import Policy, View, keep_top

__all__ = ["KeyDiff"]


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
            ops.distinctiveness(keys, view.chunk, row)
        return keep_top(scores, view.protected, slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        # Beside the scores and their ranking: a chunk in float32 and its unit keys, with norms; the mean key and its parts.
        return super().scratch(heads, tokens, head_dim, block, chunk) + 4 * (2 * chunk + 4) * (head_dim + 2)
