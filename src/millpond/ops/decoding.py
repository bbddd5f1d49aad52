"""A decoding step of several streams: each appends its token's key and value to its own memory and attends to it.

For one token of a small model, the calls into torch cost more than the attention; here one call serves all streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

Memory = tuple[Tensor, Tensor, int]
"""Of one stream keys and values [1, H, capacity, D], and how many tokens it holds, fewer than its capacity."""

_C_STEP = CFunction("decoding.cpp", "attend_step", "pppnnnnfpp")
# Beyond so many numbers in memory, torch's own threads are worth more than fewer calls.
_SMALL = 2**21


@operation
def attend_step(queries: Tensor, keys: Tensor, values: Tensor, memories: Sequence[Memory], scale: float) -> Tensor:
    """Write each stream's key and value behind what its memory holds; return what its queries gather there, [B, heads, D].

    Args:
        queries: [B, heads, D], rotated. keys, values: [B, H, D], of the same B tokens.
        memories: of the B streams, with `heads` a multiple of their H.
    """
    gathered = []
    for query, key, value, (own_keys, own_values, length) in zip(queries, keys, values, memories, strict=True):
        own_keys[0, :, length] = key
        own_values[0, :, length] = value
        # The heads that share a KV head as rows of one, which is read once.
        rows = query.view(1, key.shape[0], -1, query.shape[1])
        live = own_keys.narrow(2, 0, length + 1), own_values.narrow(2, 0, length + 1)
        gathered.append(scaled_dot_product_attention(rows, *live, scale=scale).reshape(query.shape))
    return torch.stack(gathered)


@attend_step.kernel("cpu")
def _attend_step(
    queries: Tensor, keys: Tensor, values: Tensor, memories: Sequence[Memory], scale: float
) -> Tensor | Declined:
    run = _C_STEP.of()
    streams, heads, width = keys.shape
    if run is None or queries.dtype != torch.float32 or not contiguous(queries, keys, values):
        return DECLINED
    held = sum(length for *_, length in memories) * heads * width
    if held > _SMALL and torch.get_num_threads() > 1:
        return DECLINED
    layout: list[int] = []
    for own_keys, own_values, length in memories:
        mine, theirs = own_keys.stride(), own_values.stride()
        if not own_keys.is_cpu or own_keys.dtype != torch.float32 or mine[2:] != (width, 1) or theirs[2:] != (width, 1):
            return DECLINED
        layout += (own_keys.data_ptr(), own_values.data_ptr(), mine[1], theirs[1], length)
    out = torch.empty_like(queries)
    addresses = (ctypes.c_int64 * len(layout))(*layout)
    group = queries.shape[1] // heads
    run(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        streams,
        heads,
        group,
        width,
        scale,
        addresses,
        out.data_ptr(),
    )
    return out
