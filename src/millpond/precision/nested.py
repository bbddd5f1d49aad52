"""The weight format: nested bit planes with one table per bit-width (Any-Precision LLM, Park et al., ICML 2024).

    W_b[n, k] = LUT_b[n, label[n, k] >> (P - b)]

A reading at b bits touches planes 0 ... b-1 only, so one stored model serves every bit-width. Knows matrices, not models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond import ops
from millpond.errors import PrecisionError
from millpond.ops.bit_planes import nested_labels, rows_in_turn

MIN_BITS, MAX_BITS = 3, 8


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """One N x K matrix, stored once and read at any of its bit-widths.

    Attributes:
        planes: uint8 [N, P, ceil(K / 8)], plane 0 the most significant; column k is bit k % 8 of byte k // 8.
        tables: for each bit-width b a table of centroids, float16 [N, 2^b], ascending in each row.
        columns: K.
    """

    planes: Tensor
    tables: dict[int, Tensor]
    columns: int

    @property
    def rows(self) -> int:
        return self.planes.shape[0]

    @property
    def bits(self) -> int:
        """Bit planes stored: the most bits that can be read."""
        return self.planes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes stored: planes and tables."""
        return self.planes.nbytes + sum(table.nbytes for table in self.tables.values())

    def labels(self, bits: int) -> Tensor:
        """Labels of `bits` bits, uint8 [N, K]."""
        self._check(bits)
        return nested_labels(self.planes, bits, self.columns)

    def dense(self, bits: int) -> Tensor:
        """W at `bits` bits, float32 [N, K]; touches planes 0 ... bits-1 only."""
        labels = self.labels(bits).long()
        return self.tables[bits].gather(1, labels).float()

    def kept(self, bits: int, tables: set[int]) -> NestedWeight:
        """A copy with the first `bits` planes and the named tables: what is dropped is really freed."""
        self._check(bits)
        chosen = {table: self.tables[table].clone() for table in sorted(tables)}
        return NestedWeight(self.planes[:, :bits].clone(), chosen, self.columns)

    def _check(self, bits: int) -> None:
        if not MIN_BITS <= bits <= self.bits:
            raise PrecisionError(f"a bit-width must lie between {MIN_BITS} and {self.bits} bits, not {bits}")


def check_bits(low: int, high: int) -> None:
    """Refuse a smallest and a greatest bit-width that the format does not have.

    Raises:
        PrecisionError: they are not between 3 and 8, or the wrong way round.
    """
    if not MIN_BITS <= low <= high <= MAX_BITS:
        raise PrecisionError(f"bit-widths must lie between {MIN_BITS} and {MAX_BITS}, not {low}-{high}")


def nest(weight: Tensor, sensitivity: Tensor, *, low: int = MIN_BITS, high: int = MAX_BITS) -> NestedWeight:
    """Cluster every row and keep its labels as bit planes.

    Each row is seeded with the optimal 2^low clusters by sensitivity-weighted squared error (1-D k-means, solved exactly), then
    every cluster is split in two, again optimally, until 2^high; an empty cluster repeats its neighbour's centroid.

    Args:
        weight: [N, K]. sensitivity: [N, K], at least 0; see `millpond.precision.sensitivity`.
        low, high: the smallest and the greatest bit-width.

    Raises:
        PrecisionError: shapes or bit-widths do not fit, or a number is not finite.
    """
    if weight.dim() != 2 or weight.shape != sensitivity.shape:
        raise PrecisionError(
            f"a matrix and its sensitivity must agree: {tuple(weight.shape)}, {tuple(sensitivity.shape)}"
        )
    check_bits(low, high)
    w, g = (part.detach().float().cpu().contiguous() for part in (weight, sensitivity))
    if not (bool(w.isfinite().all()) and bool(g.isfinite().all())) or bool((g < 0).any()):
        raise PrecisionError("a weight or its sensitivity is not a finite number, or a sensitivity is negative")
    if w.numel() and float(w.abs().max()) > torch.finfo(torch.float16).max:
        raise PrecisionError("a weight is too large for a table in float16")
    labels, tables = ops.cluster_rows(w, g, low, high)
    return NestedWeight(
        _bit_planes(labels.numpy(), high), {bits: table.half() for bits, table in tables.items()}, w.shape[1]
    )


def _bit_planes(labels: NDArray[np.uint8], bits: int) -> Tensor:
    planes = [np.packbits((labels >> (bits - 1 - plane)) & 1, axis=1, bitorder="little") for plane in range(bits)]
    return torch.from_numpy(np.stack(planes, axis=1))


def product(weight: NestedWeight, bits: int, x: Tensor) -> Tensor:
    """x W^T at `bits` bits, from the bit planes: x [T, K] -> [T, N], in x's dtype.

    See `millpond.ops.nested_product`.

    Raises:
        PrecisionError: no such bit-width, or no table for it.
    """
    weight._check(bits)
    if bits not in weight.tables:
        raise PrecisionError(
            f"there is no table for {bits} bits; there are: {', '.join(map(str, sorted(weight.tables)))}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        through: Tensor = _Product.apply(x, weight, bits)
        return through
    vectors = x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    out: Tensor = ops.nested_product(weight.planes, weight.tables[bits], bits, weight.columns, vectors)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


class _Product(torch.autograd.Function):
    """The same with a gradient for x; the weights have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NestedWeight, bits: int) -> Tensor:
        ctx.read = weight, bits
        return product(weight, bits, x.detach())

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (weight, bits), rows = ctx.read, above[0].float()
        found = rows.new_zeros(len(rows), weight.columns)
        for first, last, part in rows_in_turn(weight.planes, weight.tables[bits], bits, weight.columns):
            found += rows[:, first:last] @ part
        return found.to(above[0].dtype), None, None
