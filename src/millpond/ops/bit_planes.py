"""Products with a matrix that is stored as bit planes, W_b[n, k] = table[n, label[n, k] >> (P - b)], at any of its widths b.

Planes are uint8 [N, P, ceil(K / 8)], plane 0 the most significant; column k is bit k % 8 of byte k // 8. A width b reads planes
0 ... b-1 and its own table, float16 [N, 2^b].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_PRODUCT = CFunction("bit_planes.cpp", "nested_product", "pnnpnpnnnp")
_C_ROWS = CFunction("bit_planes.cpp", "nested_rows", "pnnpnnnnp")
_COMPILED_WIDTHS = range(3, 9)
# A product of fewer weights than this is over before a second thread has begun.
_WEIGHTS_A_THREAD = 1 << 19
# Vectors that are multiplied straight from the planes; more are a prompt.
_FEW = 4
# Rows that become numbers at a time where a matrix is multiplied by many vectors at once.
_ROWS_AT_ONCE = 256


def nested_labels(planes: Tensor, bits: int, columns: int) -> Tensor:
    """Labels of `bits` bits, uint8 [N, K]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    found = torch.zeros(len(planes), columns, dtype=torch.uint8, device=planes.device)
    for plane in range(bits):
        ones = (planes[:, plane, :, None] >> shifts) & 1
        found = (found << 1) | ones.flatten(1)[:, :columns]
    return found


@operation
def nested_rows(planes: Tensor, table: Tensor, bits: int, columns: int, first: int, last: int, out: Tensor) -> None:
    """Write rows first ... last-1 of W at `bits` bits to `out`, float32 [last - first, K]."""
    labels = nested_labels(planes[first:last], bits, columns)
    out.copy_(table[first:last].gather(1, labels.long()))


@nested_rows.kernel("cpu")
def _nested_rows(
    planes: Tensor, table: Tensor, bits: int, columns: int, first: int, last: int, out: Tensor
) -> Declined | None:
    run = _C_ROWS.of()
    if run is None or not (_readable(planes, table, bits) and contiguous(out)):
        return DECLINED
    stored = planes.data_ptr(), planes.shape[1], planes.shape[2], table.data_ptr(), bits
    run(*stored, first, last, columns, out.data_ptr())
    return None


def rows_in_turn(planes: Tensor, table: Tensor, bits: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
    """W as numbers, some rows at a time: first, last and W[first:last] in float32, which the next ones overwrite."""
    rows = len(planes)
    out = torch.empty(min(_ROWS_AT_ONCE, rows), columns, dtype=torch.float32, device=planes.device)
    for first in range(0, rows, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, rows)
        nested_rows(planes, table, bits, columns, first, last, out[: last - first])
        yield first, last, out[: last - first]


@operation
def nested_product(planes: Tensor, table: Tensor, bits: int, columns: int, x: Tensor) -> Tensor:
    """x W^T at `bits` bits: float32 [T, K], contiguous, to float32 [T, N].

    Some rows of W at a time become numbers, so that the whole matrix never does; the kernels multiply a few vectors straight from the
    planes, and leave more of them to this.
    """
    out = torch.empty(len(x), len(planes), dtype=torch.float32, device=x.device)
    x = x.detach()
    for first, last, rows in rows_in_turn(planes, table, bits, columns):
        torch.matmul(x, rows.T, out=out[:, first:last])
    return out


@nested_product.kernel("cpu")
def _nested_product(planes: Tensor, table: Tensor, bits: int, columns: int, x: Tensor) -> Tensor | Declined:
    run = _C_PRODUCT.of()
    vectors, rows = len(x), len(planes)
    if (
        run is None
        or vectors > _FEW
        or not (_readable(planes, table, bits) and contiguous(x))
        or x.dtype != torch.float32
    ):
        return DECLINED
    out = torch.empty(vectors, rows, dtype=torch.float32)
    stored = planes.data_ptr(), planes.shape[1], planes.shape[2], table.data_ptr(), bits
    threads = min(torch.get_num_threads(), rows * columns // _WEIGHTS_A_THREAD)
    source, target = x.data_ptr(), out.data_ptr()
    for index in range(vectors):
        at, to = source + 4 * columns * index, target + 4 * rows * index
        if threads <= 1:
            run(*stored, at, 0, rows, columns, to)
            continue
        bounds = pairwise(rows * part // threads for part in range(threads + 1))
        list(_pool(threads).map(partial(_rows_of_product, run, stored, at, columns, to), bounds))
    return out


@nested_product.kernel("cuda")
def _nested_product_on_cuda(planes: Tensor, table: Tensor, bits: int, columns: int, x: Tensor) -> Tensor | Declined:
    triton = _triton_product()
    return DECLINED if triton is None or len(x) > _FEW else triton(planes, table, bits, columns, x)


def _readable(planes: Tensor, table: Tensor, bits: int) -> bool:
    """Whether the compiled loops read planes and table as they lie."""
    return contiguous(planes, table) and table.dtype == torch.float16 and bits in _COMPILED_WIDTHS


def _rows_of_product(
    run: Callable[..., Any], stored: tuple[int, ...], x: int, columns: int, y: int, rows: tuple[int, int]
) -> None:
    run(*stored, x, *rows, columns, y)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="millpond-product")


@cache
def _triton_product() -> Callable[[Tensor, Tensor, int, int, Tensor], Tensor] | None:
    """None where there is no Triton."""
    try:
        from millpond.ops import bit_planes_triton
    except ImportError:
        return None
    return bit_planes_triton.product
