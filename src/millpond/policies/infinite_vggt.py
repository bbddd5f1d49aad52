"""InfiniteVGGT's rolling memory: KeyDiff behind an immovable first frame. Knows time only to find that frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import TEXT, Policy, View, keep_top
from millpond.policies.keydiff import distinctiveness

__all__ = ["InfiniteVGGT"]


@dataclass(frozen=True)
class InfiniteVGGT(Policy):
    """Keep the stream's first frame, and of all later tokens those with the most distinctive keys.

    The anchor is everything up to the end of the first frame group. The others, the candidates, are scored as in KeyDiff, by
    -cos(k_i, mean unit key), with the mean over the candidates alone, as the code has it. The anchor comes right after what
    the memory protects; where not even both fit, its first tokens stay and no candidate does.

    Here every layer has the same budget.
    """

    name: ClassVar[str] = "infinite-vggt"
    source: ClassVar[str] = "Yuan et al., InfiniteVGGT, 2026 (arXiv 2601.02281): code of attention and budgets"

    def keep(self, view: View, slots: int) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, device=view.keys.device)
        for keys, times, place, row in zip(view.keys, view.time_us, view.place, scores, strict=True):
            seen = times[place[:, 0] != TEXT]
            anchor = int((times <= seen[0]).sum()) if len(seen) else 0
            row[:anchor] = torch.inf
            distinctiveness(keys[anchor:], view.chunk, row[anchor:])
        return keep_top(scores, view.protected, slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        # As KeyDiff; the masks and times of one head are gone before its ranking begins.
        return super().scratch(heads, tokens, head_dim, block, chunk) + 4 * (2 * chunk + 4) * (head_dim + 2)
