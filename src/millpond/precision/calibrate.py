"""From a quantized model, a text, a limit in bytes and targets in bits to decisions for every linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.errors import PrecisionError
from millpond.memory.budget import parse_bytes
from millpond.precision.allocate import allocate, linear_bytes, water_filling
from millpond.precision.calibration import Calibration
from millpond.precision.estimators import choose_estimators, directions, meet_shares
from millpond.precision.folder import Description, read_linears, read_rest
from millpond.precision.loading import assemble
from millpond.precision.nested import MIN_BITS, NestedWeight
from millpond.precision.pairs import train_pairs

_MOST = 6
"""More bits than these gain nothing that a decoding step would notice (DP-LLM, section 3.2)."""


@dataclass(frozen=True, eq=False)
class _Stored:
    """What the folder says of all linears: second-order errors [L, W] at `bit_widths`, rows and columns, and bytes of what is not quantized."""

    names: tuple[str, ...]
    bit_widths: tuple[int, ...]
    errors: NDArray[np.float64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    rest: int

    @classmethod
    def read(cls, folder: Path) -> _Stored:
        description = Description.load(folder)
        first, last = description.bits
        bit_widths = tuple(range(max(MIN_BITS, first), min(_MOST, last) + 1))
        names, errors, shapes = [], [], []
        rest = sum(tensor.nbytes for tensor in read_rest(folder, description).values())
        for index in range(description.layers):
            for name, weight, bias, error in read_linears(folder, description, index):
                rest += 0 if bias is None else bias.nbytes
                names.append(name)
                errors.append([float(error[1, bits - first]) for bits in bit_widths])
                shapes.append((weight.rows, weight.columns))
        rows, columns = np.array(shapes).T
        return cls(tuple(names), bit_widths, np.array(errors), rows, columns, rest)


def _max_bits(stored: _Stored, memory: int | None, targets: int) -> dict[str, int]:
    """The greatest bit-width of every linear so that all weights fit into `memory` bytes.

    The error is the second-order one, sum g^2 (W - W_b)^2. Bytes are counted from above: planes, a table for every bit-width up to the
    greatest, a projection for every target, and everything that is not quantized.

    Raises:
        BudgetError: too little; names the minimum.
    """
    if memory is None:
        return dict.fromkeys(stored.names, stored.bit_widths[-1])
    nbytes = [
        [linear_bytes(int(rows), int(columns), bits, range(MIN_BITS, bits + 1)) for bits in stored.bit_widths]
        for rows, columns in zip(stored.rows, stored.columns, strict=True)
    ]
    estimators = sum(
        targets * 2 * directions(int(rows)) * int(columns)
        for rows, columns in zip(stored.rows, stored.columns, strict=True)
    )
    found = allocate(stored.errors, np.array(nbytes), stored.bit_widths, memory, stored.rest + estimators)
    return dict(zip(stored.names, found.bits, strict=True))


def calibrate(
    folder: str | Path,
    samples: Tensor,
    targets: Sequence[float],
    *,
    memory: str | int | None = None,
    quiet: bool = False,
) -> Calibration:
    """Choose bit-widths, pairs, estimators and thresholds, and write them beside the model.

    Args:
        samples: int64 [S, T] of calibration text.
        targets: mean bits of a decoding step; any number of them.
        memory: bytes for all weights; None for no limit.

    Raises:
        PrecisionError: a target outside of what the bit-widths allow. BudgetError: too little memory.
    """
    path = Path(folder)
    torch.manual_seed(0)  # what is drawn at random is the same in every run
    if not targets:
        raise PrecisionError("give at least one target in bits")
    limit = None if memory is None else parse_bytes(memory)
    stored = _Stored.read(path)
    max_bits = _max_bits(stored, limit, len(targets))
    # With every table up to the greatest bit-width: which of them are read is what is sought.
    model = assemble(path, Description.load(path), lambda name, weight: _up_to(weight, max_bits[name]))
    sizes = (stored.rows * stored.columns).astype(np.float64)
    limits = np.array([float(max_bits[name]) for name in stored.names])
    most = float((limits * sizes).sum() / sizes.sum())
    for target in targets:
        if not MIN_BITS <= target <= most:
            raise PrecisionError(
                f"a target must lie between {MIN_BITS} and {most:.2f} bits for these bit-widths, not {target:g}"
            )
    found = {}
    for target in targets:
        balanced = water_filling(stored.errors, sizes, stored.bit_widths, limits, target)
        start = dict(zip(stored.names, balanced.tolist(), strict=True))
        pairs = train_pairs(model, samples, target, start=start, quiet=quiet)
        choices, _ = choose_estimators(model, pairs, samples)
        found[float(target)] = meet_shares(model, pairs, choices, samples)
    made = Calibration(max_bits, found, limit)
    made.save(path)
    return made


def _up_to(weight: NestedWeight, bits: int) -> NestedWeight:
    return weight.kept(bits, {table for table in weight.tables if table <= bits})
