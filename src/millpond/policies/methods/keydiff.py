"""KeyDiff: the keys that point least in the common direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond import ops
from millpond.policies.base import Scorer, Shape, View
from millpond.policies.scoring.keys import unit_keys_scratch


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keep the most distinctive keys: score(i) = -cos(k_i, mean over j of k_j / ||k_j||), in each head by itself.

    Keys are scored as they lie in the cache, rotary embedding applied. The mean runs over the whole memory, what is protected
    included. There are no parameters.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "Park et al., KeyDiff, 2025 (arXiv 2504.15364): notes on the paper and on code"

    def score(self, view: View) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, device=view.keys.device)
        for keys, row in zip(view.keys, scores, strict=True):
            ops.distinctiveness(keys, view.chunk, row)
        return scores

    def scratch(self, shape: Shape) -> int:
        return super().scratch(shape) + unit_keys_scratch(shape)
