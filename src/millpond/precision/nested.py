"""The weight format: nested bit planes with one table per width (Any-Precision LLM, Park et al., ICML 2024).

    W_b[n, k] = LUT_b[n, label[n, k] >> (P - b)]

A width b reads planes 0 ... b-1 only, so one stored model serves every width. Knows matrices, not models or files.
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

__all__ = ["NestedWeight", "check_widths", "nest", "product"]

LEAST, MOST = 3, 8


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
        return nested_labels(self.planes, width, self.columns)

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
    w, g = (part.detach().float().cpu().contiguous() for part in (weight, sensitivity))
    if not (bool(w.isfinite().all()) and bool(g.isfinite().all())) or bool((g < 0).any()):
        raise PrecisionError("a weight or its sensitivity is not a finite number, or a sensitivity is negative")
    if w.numel() and float(w.abs().max()) > torch.finfo(torch.float16).max:
        raise PrecisionError("a weight is too large for a table in float16")
    labels, tables = ops.cluster_rows(w, g, low, high)
    return NestedWeight(_pack(labels.numpy(), high), {bits: table.half() for bits, table in tables.items()}, w.shape[1])


def _pack(labels: NDArray[np.uint8], bits: int) -> Tensor:
    planes = [np.packbits((labels >> (bits - 1 - plane)) & 1, axis=1, bitorder="little") for plane in range(bits)]
    return torch.from_numpy(np.stack(planes, axis=1))


def product(weight: NestedWeight, width: int, x: Tensor) -> Tensor:
    """x W^T at `width` bits, from the packed planes: x [T, K] -> [T, N], in x's dtype.

    See `millpond.ops.nested_product`.

    Raises:
        PrecisionError: no such width, or no table for it.
    """
    weight._check(width)
    if width not in weight.tables:
        raise PrecisionError(
            f"there is no table for {width} bits; there are: {', '.join(map(str, sorted(weight.tables)))}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        through: Tensor = _Product.apply(x, weight, width)
        return through
    vectors = x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    out: Tensor = ops.nested_product(weight.planes, weight.tables[width], width, weight.columns, vectors)
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
        found = rows.new_zeros(len(rows), weight.columns)
        for first, last, part in rows_in_turn(weight.planes, weight.tables[width], width, weight.columns):
            found += rows[:, first:last] @ part
        return found.to(above[0].dtype), None, None
