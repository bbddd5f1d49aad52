"""Exact weighted 1-D k-means of the rows of a matrix, and its nested refinement.

Sorted, an optimal cluster is a run, so the optimum over all clusterings is a dynamic programme over cuts (Wang and Song, 2011).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

Floats = NDArray[np.float64]
Tables = dict[int, Tensor]

_C_CLUSTER_ROWS = CFunction("clustering.cpp", "cluster_rows", "ppnnnnpp")


@operation
def cluster_rows(weight: Tensor, sensitivity: Tensor, low: int, high: int) -> tuple[Tensor, Tables]:
    """The optimal 2^low clusters of each row by sensitivity-weighted squared error, each then split in two, again optimally, until 2^high.

    Args:
        weight, sensitivity: float32 [N, K], contiguous, on a CPU.

    Returns:
        Labels of `high` bits, uint8 [N, K], and for each width low ... high a table, float32 [N, 2^width], ascending in each row; an empty
        cluster repeats its neighbour's centroid.
    """
    labels = torch.empty(weight.shape, dtype=torch.uint8)
    tables = {bits: torch.empty(len(weight), 1 << bits) for bits in range(low, high + 1)}
    for n, (row, by) in enumerate(zip(weight.numpy(), sensitivity.numpy(), strict=True)):
        found, centroids = _cluster_row(row, by, low, high)
        labels[n] = torch.from_numpy(found)
        for bits, table in centroids.items():
            tables[bits][n] = torch.from_numpy(table)
    return labels, tables


@cluster_rows.kernel("cpu")
def _cluster_rows(weight: Tensor, sensitivity: Tensor, low: int, high: int) -> tuple[Tensor, Tables] | Declined:
    run = _C_CLUSTER_ROWS.of()
    if run is None or not contiguous(weight, sensitivity) or {weight.dtype, sensitivity.dtype} != {torch.float32}:
        return DECLINED
    rows, columns = weight.shape
    labels = torch.empty(rows, columns, dtype=torch.uint8)
    sizes = [rows << bits for bits in range(low, high + 1)]
    flat = torch.empty(sum(sizes))
    run(weight.data_ptr(), sensitivity.data_ptr(), rows, columns, low, high, labels.data_ptr(), flat.data_ptr())
    parts = (part.view(rows, -1) for part in flat.split(sizes))
    return labels, dict(zip(range(low, high + 1), parts, strict=True))


def _cluster_row(
    weight: NDArray[np.float32], sensitivity: NDArray[np.float32], low: int, high: int
) -> tuple[NDArray[np.uint8], dict[int, NDArray[np.float32]]]:
    """Labels of `high` bits, uint8 [K], and for each width low ... high a table, float32 [2^width], of one row [K]."""
    count = len(weight)
    order = np.argsort(weight, kind="stable")
    values, by = weight[order].astype(np.float64), sensitivity[order].astype(np.float64)
    total = by.sum()
    by = by + (1e-6 * total / count if total > 0 else 1.0)  # weights without sensitivity still find their side
    sums = np.zeros((3, count + 1))
    for row, powers in zip(sums, (by, by * values, by * values**2), strict=True):
        row[1:] = np.cumsum(powers)
    bounds = _optimal_runs(sums, count, 1 << low)
    tables = {low: _centroids(sums, bounds, values)}
    for bits in range(low + 1, high + 1):
        finer = [0]
        for first, last in pairwise(bounds):
            cuts = np.arange(first + 1, last)
            costs = _cost(sums, first, cuts) + _cost(sums, cuts, last)
            finer += [int(cuts[costs.argmin()]) if len(cuts) else last, last]
        bounds = finer
        tables[bits] = _centroids(sums, bounds, values)
    labels = np.empty(count, dtype=np.uint8)
    labels[order] = np.repeat(np.arange(1 << high, dtype=np.uint8), np.diff(bounds))
    return labels, tables


def _cost(sums: Floats, first: int | NDArray[np.int64], last: int | NDArray[np.int64]) -> Floats:
    """Weighted squared error around the mean of the sorted elements first ... last-1."""
    first, last = np.broadcast_arrays(first, last)
    by, linear, square = sums[:, last] - sums[:, first]
    error: Floats = np.maximum(0.0, square - np.divide(linear**2, by, out=np.zeros_like(linear), where=by > 0))
    return error


def _optimal_runs(sums: Floats, count: int, clusters: int) -> list[int]:
    ends = np.arange(count + 1)
    best = _cost(sums, np.zeros_like(ends), ends)
    origin = []
    for _ in range(1, clusters):
        fresh, chosen = np.empty(count + 1), np.empty(count + 1, dtype=np.int64)
        for end in ends:
            starts = ends[: end + 1]
            costs = best[: end + 1] + _cost(sums, starts, np.full_like(starts, end))
            chosen[end] = costs.argmin()
            fresh[end] = costs[chosen[end]]
        best = fresh
        origin.append(chosen)
    bounds = [count]
    for chosen in reversed(origin):
        bounds.append(int(chosen[bounds[-1]]))
    return [0, *bounds[::-1]]


def _centroids(sums: Floats, bounds: list[int], values: Floats) -> NDArray[np.float32]:
    """One a cluster; an empty one repeats its neighbour's."""
    table = np.empty(len(bounds) - 1, dtype=np.float32)
    latest = values[0]
    for index, (first, last) in enumerate(pairwise(bounds)):
        if last > first:
            latest = (sums[1, last] - sums[1, first]) / (sums[0, last] - sums[0, first])
        table[index] = latest
    return table
