"""Metadata of a block's tokens, written into every layer at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

LayerMetadata = tuple[int, Tensor, Tensor, Tensor, Tensor | None]
"""Of one layer the slot where the block begins, and times int64 [H, capacity], grid positions int16 [H, capacity, 2],
positions int32 [H, capacity, axes], and accumulated attention float32 [H, capacity] or None."""

_C_WRITE = CFunction("metadata.cpp", "write_metadata", "pppnnnnpn")


@operation
def write_metadata(time_us: Tensor, grid_position: Tensor, positions: Tensor, layers: Sequence[LayerMetadata]) -> None:
    """Write the metadata of n tokens into slots start... of every head of every layer; accumulated attention becomes 0.

    Args:
        time_us: int64 [n]. grid_position: int16 [n, 2]. positions: int [n, axes].
        layers: see `LayerMetadata`; each has n slots left.
    """
    count = time_us.shape[0]
    for start, times, grid_positions, rotary, sums in layers:
        times.narrow(1, start, count).copy_(time_us)
        grid_positions.narrow(1, start, count).copy_(grid_position)
        rotary.narrow(1, start, count).copy_(positions)
        if sums is not None:
            sums.narrow(1, start, count).zero_()


@write_metadata.kernel("cpu")
def _write_metadata(
    time_us: Tensor, grid_position: Tensor, positions: Tensor, layers: Sequence[LayerMetadata]
) -> Declined | None:
    run, count = _C_WRITE.of(), time_us.shape[0]
    axes = positions.shape[1]
    if run is None or not (contiguous(time_us, grid_position) and positions.is_cpu):
        return DECLINED
    if (time_us.dtype, grid_position.dtype, positions.dtype) != (torch.int64, torch.int16, torch.int64):
        return DECLINED
    layout: list[int] = []
    for start, times, grid_positions, rotary, sums in layers:
        (heads, capacity), time, placed, rotated = times.shape, times.stride(), grid_positions.stride(), rotary.stride()
        if start + count > capacity or not times.is_cpu:
            return DECLINED
        if time[1] != 1 or placed[1:] != (2, 1) or rotated[1:] != (axes, 1):
            return DECLINED
        layout += (heads, times.data_ptr() + 8 * start, time[0], grid_positions.data_ptr() + 4 * start, placed[0])
        layout += (rotary.data_ptr() + 4 * axes * start, rotated[0])
        if sums is not None and sums.stride(1) != 1:
            return DECLINED
        layout += (0, 0) if sums is None else (sums.data_ptr() + 4 * start, sums.stride(0))
    addresses = (ctypes.c_int64 * len(layout))(*layout)
    step = positions.stride()
    run(time_us.data_ptr(), grid_position.data_ptr(), positions.data_ptr(), *step, axes, count, addresses, len(layers))
    return None
