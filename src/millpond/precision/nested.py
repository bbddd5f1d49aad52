"""The weight format: nested bit planes with one table per width (Any-Precision LLM, Park et al., ICML 2024).

    W_b[n, k] = LUT_b[n, label[n, k] >> (P - b)]

A width b reads planes 0 ... b-1 only, so one stored model serves every width. Knows matrices, not models or files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.errors import PrecisionError
from millpond.native.build import compiled
from millpond.precision.clusters import nest_row

__all__ = ["NestedWeight", "check_widths", "nest", "product", "status"]

LEAST, MOST = 3, 8
_KERNELS = Path(__file__).with_name("nested.cpp")
# A product of fewer weights than this is over before a second thread has begun.
_WEIGHTS_A_THREAD = 1 << 19
# Vectors that are multiplied straight from the planes; more are a prompt.
_FEW = 4
# Rows that are turned into numbers at a time where a matrix is multiplied by many vectors at once.
_ROWS_AT_ONCE = 256


def status() -> str:
    """One line for people: where the compiled kernels are, or why there are none."""
    return compiled(_KERNELS)[1]


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """One N x K matrix, stored once and read at any of its widths.

    Attributes:
        planes: uint8 [N, P, ceil(K / 8)], plane 0 the most significant; column k is bit k % 8 of byte k // 8.
        tables: for each width b a table of centroids, float16 [N, 2^b], ascending in each row.
        columns: K.
    """

    planes: Tensor
    tables: dict[int, Tensor]
    columns: int

    @property
    def rows(self) -> int:
        return self.planes.shape[0]

    @property
    def width(self) -> int:
        """Bit planes stored: the largest width that can be read."""
        return self.planes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes stored: planes and tables."""
        return self.planes.nbytes + sum(table.nbytes for table in self.tables.values())

    def labels(self, width: int) -> Tensor:
        """Labels of `width` bits, uint8 [N, K]."""
        self._check(width)
        shifts = torch.arange(8, dtype=torch.uint8, device=self.planes.device)
        found = torch.zeros(self.rows, self.columns, dtype=torch.uint8, device=self.planes.device)
        for plane in range(width):
            bits = (self.planes[:, plane, :, None] >> shifts) & 1
            found = (found << 1) | bits.flatten(1)[:, : self.columns]
        return found

    def dense(self, width: int) -> Tensor:
        """W at `width` bits, float32 [N, K]; touches planes 0 ... width-1 only."""
        labels = self.labels(width).long()
        return self.tables[width].gather(1, labels).float()

    def kept(self, width: int, tables: set[int]) -> NestedWeight:
        """A copy with the planes up to `width` and the named tables: what is dropped is really freed."""
        self._check(width)
        chosen = {bits: self.tables[bits].clone() for bits in sorted(tables)}
        return NestedWeight(self.planes[:, :width].clone(), chosen, self.columns)

    def _check(self, width: int) -> None:
        if not LEAST <= width <= self.width:
            raise PrecisionError(f"a width must lie between {LEAST} and {self.width} bits, not {width}")


def check_widths(low: int, high: int) -> None:
    """Refuse least and greatest widths that the format does not have.

    Raises:
        PrecisionError: they are not between 3 and 8, or the wrong way round.
    """
    if not LEAST <= low <= high <= MOST:
        raise PrecisionError(f"widths must lie between {LEAST} and {MOST}, not {low}-{high}")


def nest(weight: Tensor, sensitivity: Tensor, *, low: int = LEAST, high: int = MOST) -> NestedWeight:
    """Cluster every row and keep its labels as bit planes.

    Each row is seeded with the optimal 2^low clusters by sensitivity-weighted squared error (1-D k-means, solved exactly), then
    every cluster is split in two, again optimally, until 2^high; an empty cluster repeats its neighbour's centroid.

    Args:
        weight: [N, K]. sensitivity: [N, K], at least 0; see `millpond.precision.sensitivity`.
        low, high: the least and the greatest width.

    Raises:
        PrecisionError: shapes or widths do not fit, or a number is not finite.
    """
    if weight.dim() != 2 or weight.shape != sensitivity.shape:
        raise PrecisionError(
            f"a matrix and its sensitivity must agree: {tuple(weight.shape)}, {tuple(sensitivity.shape)}"
        )
    check_widths(low, high)
    w, g = (np.ascontiguousarray(part.detach().float().cpu().numpy()) for part in (weight, sensitivity))
    if not (np.isfinite(w).all() and np.isfinite(g).all()) or (g < 0).any():
        raise PrecisionError("a weight or its sensitivity is not a finite number, or a sensitivity is negative")
    if np.abs(w).max(initial=0) > torch.finfo(torch.float16).max:
        raise PrecisionError("a weight is too large for a table in float16")
    labels, tables = _cluster(w, g, low, high)
    return NestedWeight(
        _pack(labels, high), {bits: torch.from_numpy(table).half() for bits, table in tables.items()}, w.shape[1]
    )


def _cluster(
    w: NDArray[np.float32], g: NDArray[np.float32], low: int, high: int
) -> tuple[NDArray[np.uint8], dict[int, NDArray[np.float32]]]:
    rows, cols = w.shape
    labels = np.empty((rows, cols), dtype=np.uint8)
    widths = range(low, high + 1)
    flat = np.empty(rows * sum(1 << bits for bits in widths), dtype=np.float32)
    starts = np.cumsum([0, *(rows << bits for bits in widths)])
    tables = {
        bits: flat[start : start + (rows << bits)].reshape(rows, -1)
        for bits, start in zip(widths, starts[:-1], strict=True)
    }
    library = compiled(_KERNELS)[0]
    if library is not None:
        sizes = [ctypes.c_int64(size) for size in (rows, cols, low, high)]
        library.millpond_nest_rows(
            *(_numpy_pointer(part) for part in (w, g)), *sizes, _numpy_pointer(labels), _numpy_pointer(flat)
        )
        return labels, tables
    for n in range(rows):
        labels[n], found = nest_row(w[n], g[n], low, high)
        for bits, table in found.items():
            tables[bits][n] = table
    return labels, tables


def _pack(labels: NDArray[np.uint8], bits: int) -> Tensor:
    planes = [np.packbits((labels >> (bits - 1 - plane)) & 1, axis=1, bitorder="little") for plane in range(bits)]
    return torch.from_numpy(np.stack(planes, axis=1))


def product(weight: NestedWeight, width: int, x: Tensor) -> Tensor:
    """x W^T at `width` bits, from the packed planes: x [T, K] -> [T, N], in x's dtype.

    A few vectors are multiplied straight from the planes; for many, some rows of W at a time become numbers, so that the whole
    matrix never does.
    """
    weight._check(width)
    if width not in weight.tables:
        raise PrecisionError(
            f"there is no table for {width} bits; there are: {', '.join(map(str, sorted(weight.tables)))}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        through: Tensor = _Product.apply(x, weight, width)
        return through
    if x.device.type == "cuda" and len(x) <= _FEW and (on_gpu := _triton_product()) is not None:
        found: Tensor = on_gpu(weight, width, x)
        return found
    vectors = x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    library = compiled(_KERNELS)[0] if x.device.type == "cpu" else None
    out = torch.empty(len(vectors), weight.rows, dtype=torch.float32, device=x.device)
    if library is not None and len(vectors) <= _FEW:
        _few_products(library, weight, width, vectors, out)
    else:
        vectors = vectors.detach()
        for first, last, rows in _some_rows(library, weight, width):
            torch.matmul(vectors, rows.T, out=out[:, first:last])
    return out if x.dtype == torch.float32 else out.to(x.dtype)


class _Product(torch.autograd.Function):
    """The same with a gradient for x; the weights have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NestedWeight, width: int) -> Tensor:
        ctx.read = weight, width
        return product(weight, width, x.detach())

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (weight, width), rows = ctx.read, above[0].float()
        library = compiled(_KERNELS)[0] if rows.device.type == "cpu" else None
        found = rows.new_zeros(len(rows), weight.columns)
        for first, last, part in _some_rows(library, weight, width):
            found += rows[:, first:last] @ part
        return found.to(above[0].dtype), None, None


@cache
def _triton_product() -> Callable[[NestedWeight, int, Tensor], Tensor] | None:
    """The kernel for CUDA; None where there is no Triton."""
    try:
        from millpond.precision import triton_kernel
    except ImportError:
        return None
    return triton_kernel.product


def _few_products(library: ctypes.CDLL, weight: NestedWeight, width: int, vectors: Tensor, out: Tensor) -> None:
    # Numbers, not ctypes objects: on a small matrix making those takes as long as the product.
    run, planes = _declared(library), weight.planes
    rows, columns = planes.shape[0], weight.columns
    stored = planes.data_ptr(), planes.shape[1], planes.shape[2], weight.tables[width].data_ptr(), width
    threads = min(torch.get_num_threads(), rows * columns // _WEIGHTS_A_THREAD)
    x, y = vectors.data_ptr(), out.data_ptr()
    for index in range(len(vectors)):
        at, to = x + 4 * columns * index, y + 4 * rows * index
        if threads <= 1:
            run(*stored, at, 0, rows, columns, to)
            continue
        bounds = pairwise(rows * part // threads for part in range(threads + 1))
        list(_pool(threads).map(partial(_rows_of_product, run, stored, at, columns, to), bounds))


def _rows_of_product(run: Any, stored: tuple[int, ...], x: int, columns: int, y: int, rows: tuple[int, int]) -> None:
    run(*stored, x, *rows, columns, y)


@cache
def _declared(library: ctypes.CDLL) -> Any:
    run = library.millpond_nested_product
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = (pointer, number, number, pointer, number, pointer, number, number, number, pointer)
    run.restype = None
    return run


def _some_rows(library: ctypes.CDLL | None, weight: NestedWeight, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """The matrix as numbers, some rows at a time: first, last and W[first:last] in float32, which the next ones overwrite."""
    most = min(_ROWS_AT_ONCE, weight.rows)
    out = torch.empty(most if library is not None else 0, weight.columns, dtype=torch.float32)
    for first in range(0, weight.rows, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, weight.rows)
        if library is None:
            part = NestedWeight(weight.planes[first:last], {width: weight.tables[width][first:last]}, weight.columns)
            yield first, last, part.dense(width)
            continue
        library.millpond_nested_rows(*_sizes(weight, width), *_longs(first, last, weight.columns), _pointer(out))
        yield first, last, out[: last - first]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="millpond-precision")


def _sizes(weight: NestedWeight, width: int) -> tuple[ctypes.c_void_p | ctypes.c_int64, ...]:
    planes, table = weight.planes, weight.tables[width]
    return _pointer(planes), *_longs(planes.shape[1], planes.shape[2]), _pointer(table), ctypes.c_int64(width)


def _longs(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(ctypes.c_int64(value) for value in values)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _numpy_pointer(array: NDArray[np.float32] | NDArray[np.uint8]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
