"""The same token in two layers: found by its stream time and its place, head by head.

After the first compaction layers and heads hold different tokens, so the i-th of one is not the i-th of another. Knows no scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["carried_scores_of", "matching_scratch", "stream_order"]


def carried_scores_of(
    scores: Tensor, time_us: Tensor, grid_position: Tensor, to_time_us: Tensor, to_place: Tensor
) -> Tensor:
    """What one layer's scores say of another layer's tokens: float32 [H, m], NaN where that layer does not hold the token.

    Tokens without a place (text, separators) are NaN too: several share a time and a place, and cannot be told apart.

    Args:
        scores: float32 [H, n]. time_us, place: int64 [H, n] and int16 [H, n, 2] of the same tokens, as in `View`.
        to_time_us, to_place: int64 [H, m] and int16 [H, m, 2] of the other layer's tokens.
    """
    out = torch.empty(to_time_us.shape, device=scores.device)
    for head, row in enumerate(out):
        # Of the time only its rank among those that the layer holds, so that all fits in.
        held, order = _stream_keys(torch.searchsorted(time_us[head], time_us[head]), grid_position[head]).sort(
            stable=True
        )
        wanted = _stream_keys(torch.searchsorted(time_us[head], to_time_us[head]), to_place[head])
        at = torch.searchsorted(held, wanted).clamp_(max=len(held) - 1)
        same = held[at] == wanted
        del held, wanted
        at = order[at]
        del order
        # A time that the layer does not hold has the rank of the next one.
        same &= time_us[head][at] == to_time_us[head]
        same &= to_place[head, :, 0] >= 0
        row.copy_(scores[head][at]).masked_fill_(~same, torch.nan)
    return out


def matching_scratch(tokens: int) -> int:
    """The most bytes that `carried_scores_of` allocates for layers of at most `tokens` tokens, beside its result."""
    return 72 * tokens + 64


def stream_order(time: Tensor, grid_position: Tensor) -> Tensor:
    """The order in which tokens stood in the stream, int64 [n].

    Args:
        time: int [n] below 2^31, first rotary position, which grows along the stream and is shared only within a frame.
        place: int16 [n, 2], which orders a frame by rows.
    """
    return _stream_keys(time.to(torch.int64, copy=True), grid_position).argsort(stable=True)


def _stream_keys(time: Tensor, grid_position: Tensor) -> Tensor:
    """One number for each token's time, int64 [n] below 2^31 and overwritten, and its place, which grows along the stream."""
    time.bitwise_left_shift_(32)
    time.add_(grid_position[:, 0].to(torch.int64).add_(2).bitwise_left_shift_(16))
    return time.add_(grid_position[:, 1].to(torch.int64).add_(2))
