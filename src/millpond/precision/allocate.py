"""The greatest bit-width of every linear under a limit in bytes, by an integer linear programme (DP-LLM, section 3.2).

    minimise  sum_l sum_b z[l, b] error[l, b]   subject to   sum_l sum_b z[l, b] bytes[l, b] <= limit,   sum_b z[l, b] = 1

Bytes are real ones: planes and the tables that are kept. Knows numbers, not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millpond.errors import BudgetError, MillpondError
from millpond.memory.budget import format_bytes


@dataclass(frozen=True)
class Allocation:
    """One bit-width for each linear.

    Attributes:
        bits: in the order given.
        nbytes: what they take.
        error: the objective.
    """

    bits: tuple[int, ...]
    nbytes: int
    error: float


def linear_bytes(rows: int, columns: int, bits: int, tables: Sequence[int]) -> int:
    """Bytes of one stored linear: `bits` planes and a float16 table for each bit-width in `tables`."""
    return rows * (bits * -(-columns // 8) + sum(2 << table for table in tables))


def allocate(
    errors: NDArray[np.float64], nbytes: NDArray[np.int64], bit_widths: Sequence[int], limit: int, rest: int = 0
) -> Allocation:
    """Choose a bit-width for each of L linears, exactly (HiGHS).

    Args:
        errors: [L, W], what each bit-width costs.
        nbytes: [L, W], what each bit-width takes.
        bit_widths: the W bit-widths.
        limit: bytes for everything; `rest` of them are taken already.

    Raises:
        BudgetError: not even the smallest bit-widths fit; names the minimum.
        MillpondError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise MillpondError("choosing bit-widths needs scipy: pip install 'millpond[precision]'") from None
    count, choices = errors.shape
    minimum = rest + int(nbytes.min(axis=1).sum())
    if limit < minimum:
        raise BudgetError(
            f"{format_bytes(limit)} are too few for these weights: the minimum that works is {minimum} bytes ({format_bytes(minimum)})",
            minimum=minimum,
        )
    each = csr_array(np.kron(np.eye(count), np.ones((1, choices))))
    scale = max(float(np.abs(errors).max()), 1e-300)
    found = milp(
        (errors / scale).ravel(),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(nbytes.astype(np.float64).ravel()[None], -np.inf, limit - rest),
        ],
        integrality=np.ones(count * choices),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if found.x is None:
        raise MillpondError(f"the choice of bit-widths failed: {found.message}")
    picked = found.x.reshape(count, choices).argmax(axis=1)
    rows = np.arange(count)
    return Allocation(
        tuple(int(bit_widths[index]) for index in picked),
        rest + int(nbytes[rows, picked].sum()),
        float(errors[rows, picked].sum()),
    )


def water_filling(
    errors: NDArray[np.float64],
    sizes: NDArray[np.float64],
    bit_widths: Sequence[int],
    most: NDArray[np.float64],
    target: float,
) -> NDArray[np.float64]:
    """Precisions between the bit-widths for which no linear gains more from a further bit than another does.

    The relaxation of `allocate` with an error that falls geometrically between two bit-widths, as the error of a quantizer does with its
    rate, and equal slopes per weight ("reverse water-filling"; Cover and Thomas, Elements of Information Theory, section 10.3.3).

    Args:
        errors: [L, W], what each bit-width costs.
        sizes: [L], weights of each linear.
        bit_widths: the W bit-widths, ascending.
        most: [L], the greatest bit-width of each.
        target: their mean, weighted by size.

    Returns:
        [L], to a hundredth of a bit.
    """
    points = np.linspace(bit_widths[0], bit_widths[-1], 100 * (bit_widths[-1] - bit_widths[0]) + 1)
    logs = np.log(np.maximum(errors, np.finfo(np.float64).tiny))
    cost = np.exp(np.stack([np.interp(points, bit_widths, row) for row in logs])) / sizes[:, None]
    cost[points[None] > most[:, None] + 1e-9] = np.inf

    def precisions(slope: float) -> NDArray[np.float64]:
        return np.asarray(points[(cost + np.exp(slope) * points).argmin(axis=1)])

    low, high = -80.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if (precisions(middle) * sizes).sum() > target * sizes.sum():
            low = middle
        else:
            high = middle
    return precisions(high)
