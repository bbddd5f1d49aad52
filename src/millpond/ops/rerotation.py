"""Rotating stored keys to other positions of their rotary embedding, in place."""

from __future__ import annotations

import ctypes
from math import prod

import torch
from torch import Tensor

from millpond.memory.resumable import Pieces, Progress
from millpond.ops.c_functions import CFunction, contiguous, contiguous_rows
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_REROTATE = CFunction("rerotation.cpp", "rerotate", "pnnnnpnnnppnp", by_dtype=True)


@operation
def rerotate(
    keys: Tensor, delta: Tensor, axis: Tensor, inv_freq: Tensor, chunk: int = 0, progress: Progress | None = None
) -> None:
    """Rotate keys by `delta` positions, in place; in float32, stored back in the keys' dtype.

    Frequency i rotates components i and i + F ("rotate half"); components from 2 F on stay as they are.

    Args:
        keys: [..., n, D]. delta: int64 [..., n, axes], broadcastable to the keys; with `chunk` [n, axes].
        axis: int64 [F], the column of `delta` that each frequency reads. inv_freq: float32 [F].
        chunk: tokens rotated at a time where there is no kernel; 0 for all.
        progress: goes on from there; what is done does not rotate again.
    """
    count = keys.shape[-2]
    chunk = chunk or max(1, count)

    def part(tensor: Tensor, index: int) -> Tensor:
        if chunk >= count:
            return tensor  # a delta that is broadcast has fewer rows
        return tensor.narrow(-2, index * chunk, min(chunk, count - index * chunk))

    def make(index: int) -> tuple[Tensor]:
        rows = part(keys, index)
        rows = rows if progress is None else rows.clone()
        _rotate(rows, part(delta, index), axis, inv_freq)
        return (rows,)

    def write(index: int, rows: Tensor) -> None:
        if progress is not None:
            part(keys, index).copy_(rows)

    (Pieces() if progress is None else progress.pieces).run(-(-count // chunk), make, write)


def _rotate(keys: Tensor, delta: Tensor, axis: Tensor, inv_freq: Tensor) -> None:
    half = inv_freq.shape[0]
    # Angles in float64: hundreds of radians in float32 are off by 1e-5, which would add up over re-anchorings.
    picked = delta.index_select(-1, axis.to(delta.device)).to(keys.device, torch.float64)
    angle = picked * inv_freq.to(keys.device, torch.float64)
    cos, sin = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
    low, high = keys[..., :half].to(torch.float32), keys[..., half : 2 * half].to(torch.float32)
    first = low * cos - high * sin
    keys[..., half : 2 * half] = high * cos + low * sin
    keys[..., :half] = first


@rerotate.kernel("cpu")
def _rerotate(
    keys: Tensor, delta: Tensor, axis: Tensor, inv_freq: Tensor, chunk: int = 0, progress: Progress | None = None
) -> Declined | None:
    run = _C_REROTATE.of(keys.dtype)
    tokens, head_dim = keys.shape[-2:]
    if run is None or not delta.is_cpu or delta.dtype != torch.int64 or delta.shape[:-1] != (tokens,):
        return DECLINED
    if not (contiguous_rows(keys) and contiguous(axis, inv_freq)):
        return DECLINED
    shape, strides = keys.shape[:-2], keys.stride()[:-2]
    if any(shape[at] != 1 and strides[at] != shape[at + 1] * strides[at + 1] for at in range(len(shape) - 1)):
        return DECLINED  # heads that do not lie at equal distances
    run(
        *(keys.data_ptr(), strides[-1] if shape else 0, prod(shape), tokens, head_dim),
        *(delta.data_ptr(), *delta.stride(), delta.shape[1]),
        *(axis.data_ptr(), inv_freq.data_ptr(), len(inv_freq)),
        None if progress is None else ctypes.byref(progress.count),
    )
    return None
