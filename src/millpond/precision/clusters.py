"""Exact weighted 1-D k-means of one row, and its nested refinement, in numpy: what the compiled kernel does, readable.

Sorted, an optimal cluster is a run, so the optimum over all clusterings is a dynamic programme over cuts (Wang and Song, 2011).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["nest_row"]

Floats = NDArray[np.float64]


def nest_row(
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
