"""The same token in two layers: found by its stream time and its grid position, head by head.

After the first compaction layers and heads hold different tokens, so the i-th of one is not the i-th of another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def match_scores(scores: Tensor, time_us: Tensor, grid_position: Tensor, to_us: Tensor, to_position: Tensor) -> Tensor:
    """What one layer's scores say of another layer's tokens: float32 [H, m], NaN where that layer does not hold the token.

    Tokens on no grid (text, separators) are NaN too: several share a time, and cannot be told apart.

    Args:
        scores: float32 [H, n]. time_us, grid_position: int64 [H, n] and int16 [H, n, 2] of the same tokens, as in `View`.
        to_us, to_position: int64 [H, m] and int16 [H, m, 2] of the other layer's tokens.
    """
    out = torch.empty(to_us.shape, device=scores.device)
    for head, row in enumerate(out):
        held, order = _keys(time_us[head], time_us[head], grid_position[head]).sort(stable=True)
        wanted = _keys(time_us[head], to_us[head], to_position[head])
        at = torch.searchsorted(held, wanted).clamp_(max=len(held) - 1)
        same = held[at] == wanted
        del held, wanted
        at = order[at]
        del order
        # A time that the layer does not hold has the rank of the next one.
        same &= time_us[head][at] == to_us[head]
        same &= to_position[head, :, 0] >= 0
        row.copy_(scores[head][at]).masked_fill_(~same, torch.nan)
    return out


def matching_scratch(tokens: int) -> int:
    """The most bytes that `match_scores` allocates for layers of at most `tokens` tokens, beside its result."""
    return 72 * tokens + 64


def order_keys(time: Tensor, grid_position: Tensor) -> Tensor:
    """One number for each token's time and grid position, int64 [n], that ascends in the order of the stream.

    Args:
        time: int64 [n], below 2^31; overwritten. grid_position: int16 [n, 2], which orders a frame by rows.
    """
    time.bitwise_left_shift_(32)
    time.add_(grid_position[:, 0].to(torch.int64).add_(2).bitwise_left_shift_(16))
    return time.add_(grid_position[:, 1].to(torch.int64).add_(2))


def _keys(times: Tensor, time_us: Tensor, grid_position: Tensor) -> Tensor:
    """Those of one layer's tokens, or of another's, int64 [n]; of the time only its rank among `times`, so that all fits in."""
    return order_keys(torch.searchsorted(times, time_us), grid_position)
