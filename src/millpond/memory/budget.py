"""A memory budget in bytes, as people write and read it. What it is split into is `millpond.cache.plan`'s business."""

from __future__ import annotations

import math
import re

from millpond.errors import BudgetError

_UNITS = {"": 1, "b": 1} | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: str | int) -> int:
    """Read a size in bytes: `"64MiB"`, `"1.5 GB"`, `"4096"` or a plain int.

    kB/MB/GB/TB are powers of 1000, KiB/MiB/GiB/TiB powers of 1024. Fractions of a byte are dropped, never rounded up,
    because a budget is a ceiling.

    Raises:
        BudgetError: not a size, not positive, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise BudgetError(f"a budget is a number of bytes or a string such as '64MiB', not {value!r}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match.group(2).lower() not in _UNITS:
            raise BudgetError(f"cannot read {value!r} as a size: write a number of bytes, or for example 64MiB or 2GB")
        number, unit = match.group(1).replace("_", ""), _UNITS[match.group(2).lower()]
        size = int(number) * unit if "." not in number else math.floor(float(number) * unit)
    if size <= 0:
        raise BudgetError(f"a budget must be at least one byte, not {value!r}")
    return size


def format_bytes(size: int) -> str:
    """Print a size for people, in binary units: `1536` gives `"1.50 KiB"`."""
    if abs(size) < 1024:
        return f"{size} B"
    number = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if abs(number) < 1024:
            return f"{number:.2f} {unit}"
    return f"{number / 1024:.2f} TiB"


class Budget(int):
    """A positive number of bytes that can be written the way people write sizes.

    >>> Budget("64MiB") == 64 * 1024 * 1024
    True
    """

    def __new__(cls, value: str | int) -> Budget:
        return super().__new__(cls, parse_bytes(value))

    def __str__(self) -> str:
        return format_bytes(self)

    def __repr__(self) -> str:
        return f"Budget({int(self)})"
