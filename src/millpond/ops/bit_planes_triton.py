"""The product with bit planes on CUDA, in Triton: labels from the bit planes, numbers from the row's table, and their dot with x, in one kernel.

The same contract as `millpond.ops.bit_planes.nested_product`. Imports Triton at once, so import it only where there is one. It has been run in
Triton's interpreter only: how fast it is on a GPU is not known.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

# Rows of W that a program multiplies, and columns that it reads at a time: 16 bytes of each plane of each row.
_ROWS, _COLUMNS = 16, 128


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    planes, table, x, y, rows, columns, row_bytes, plane_bytes,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # 64-bit offsets: a table or the planes of a large head pass 2^31 entries.
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    vector = tl.program_id(1).to(tl.int64)
    inside = n < rows
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        valid = inside[:, None] & (k < columns)[None, :]
        at = planes + n[:, None] * row_bytes + (k // 8)[None, :]
        label = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for plane in tl.static_range(BITS):
            byte = tl.load(at + plane * plane_bytes, mask=valid, other=0).to(tl.int32)
            label = label * 2 + ((byte >> (k % 8)[None, :]) & 1)
        w = tl.load(table + n[:, None] * (1 << BITS) + label, mask=valid, other=0.0).to(tl.float32)
        part = tl.load(x + vector * columns + k, mask=k < columns, other=0.0)
        total += tl.sum(w * part[None, :], axis=1)
    tl.store(y + vector * rows + n, total, mask=inside)


def product(planes: Tensor, table: Tensor, bits: int, columns: int, x: Tensor) -> Tensor:
    """x W^T at `bits` bits, from planes 0 ... bits - 1: float32 [T, K] -> [T, N]; sums in float32."""
    rows, vectors = len(planes), x.detach().contiguous()
    planes, table = planes.contiguous(), table.contiguous()
    out = torch.empty(len(vectors), rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, _ROWS), len(vectors))
    if len(vectors):
        _kernel[grid](
            planes, table, vectors, out, rows, columns, planes.stride(0), planes.stride(1),
            BITS=bits, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip
    return out
