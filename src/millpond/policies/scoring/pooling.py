"""Average pooling over frames' grids, of tokens that may be missing. Knows places and times, nothing about scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from millpond.policies.base import View

__all__ = ["pool_over_grid"]


def pool_over_grid(values: Tensor, view: View, kernel: int) -> None:
    """Replace each visual token's value by the mean over the tokens of its frame in a kernel x kernel window, in place.

    Only tokens that exist count: neither the padding at a frame's border nor the holes of earlier passes. Tokens without a
    place keep their value. Works on as many frames at a time as fit into `view.chunk` grid cells, because after many
    passes few tokens spread over many frames.

    Args:
        values: float32 [H, n].
        kernel: odd window size.
    """
    for head in range(view.heads):
        visual = (view.grid_position[head, :, 0] >= 0).nonzero()[:, 0]
        if not len(visual):
            continue
        times = view.time_us[head].index_select(0, visual)
        frame = torch.zeros(len(visual), dtype=torch.int32, device=visual.device)
        torch.cumsum(times[1:] != times[:-1], 0, out=frame[1:])
        del times
        rows, cols = (view.grid_position[head].amax(dim=0) + 1).tolist()
        cells = rows * cols
        at_once = max(1, view.chunk // cells)
        for first in range(0, int(frame[-1]) + 1, at_once):
            ends = torch.tensor([first, first + at_once], dtype=torch.int32, device=frame.device)
            low, high = torch.searchsorted(frame, ends).tolist()
            part = visual[low:high]
            grid_position = view.grid_position[head].index_select(0, part)
            at = (
                (frame[low:high] - first) * cells + grid_position[:, 0].to(torch.int32) * cols + grid_position[:, 1]
            ).long()
            grid = torch.zeros(2, at_once * cells, dtype=torch.float32, device=values.device)
            grid[0].index_copy_(0, at, values[head].index_select(0, part))
            grid[1].index_fill_(0, at, 1.0)
            sums = grid.view(2 * at_once, 1, rows, cols)
            # Sums over the window, one axis after the other; the count of existing tokens is pooled alike.
            for size in ((kernel, 1), (1, kernel)):
                sums = functional.avg_pool2d(sums, size, 1, (size[0] // 2, size[1] // 2), divisor_override=1)
            pooled = sums.reshape(2, -1).index_select(1, at)
            values[head].index_copy_(0, part, pooled[0] / pooled[1])
