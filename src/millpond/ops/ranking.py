"""The best of many scores, without sorting them."""

from __future__ import annotations

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_BEST = CFunction("ranking.cpp", "best", "pnnnpp")


def best_and_protected(scores: Tensor, protected: Tensor, slots: int) -> Tensor:
    """The protected tokens and the best of the others, ascending: int64 [H, slots].

    Args:
        scores: float [H, n], overwritten; what is not a number ranks last, what is infinite below protection.
        protected: bool [H, n], at most `slots` in each row.
    """
    scores.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)
    return best(scores.masked_fill_(protected, torch.inf), slots)


@operation
def best(scores: Tensor, slots: int) -> Tensor:
    """Indices of the `slots` largest scores in each row, ascending; of equals the first ones.

    Args:
        scores: float [H, n], every one a number. slots: at least 1, at most n.

    Returns:
        int64 [H, slots].
    """
    keep = torch.empty(scores.shape[0], slots, dtype=torch.int64, device=scores.device)
    for head, row in enumerate(scores):
        # No sort: the lowest score that stays, what lies above it, and as many of its equals as fit.
        minimum = row.kthvalue(len(row) - slots + 1).values
        chosen, ties = row > minimum, row == minimum
        chosen |= ties & (ties.cumsum(0, dtype=torch.int32) <= slots - chosen.sum())
        keep[head] = chosen.nonzero()[:, 0]
    return keep


@best.kernel("cpu")
def _best(scores: Tensor, slots: int) -> Tensor | Declined:
    run = _C_BEST.of()
    heads, tokens = scores.shape
    if run is None or scores.dtype != torch.float32 or not scores.is_contiguous() or not 0 < slots <= tokens:
        return DECLINED
    keep = torch.empty(heads, slots, dtype=torch.int64)
    work = torch.empty(2 * tokens, dtype=torch.int32)
    run(scores.data_ptr(), heads, tokens, slots, work.data_ptr(), keep.data_ptr())
    return keep
