"""Bytes shared out among sessions: what each may get, and who holds how many at this instant. Arithmetic; knows no session."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes

Share = Literal["equal", "weight", "fixed"]
"""How bytes are shared out: alike; by each session's weight; or to each what it asked for, never changed."""


@dataclass(frozen=True)
class Claim:
    """What one session asks of the whole.

    Attributes:
        name: of the session. weight: its share beside the others'.
        least, most: bytes that it cannot or will not go below, and never takes more than; None: as many as there are.
    """

    name: str
    weight: float
    least: int
    most: int | None = None

    def at(self, level: float) -> int:
        """Bytes at `level` bytes a unit of weight."""
        most = sys.maxsize if self.most is None else self.most
        return max(self.least, min(most, int(min(level * self.weight, sys.maxsize))))


def share_out(total: int, claims: Collection[Claim]) -> dict[str, int]:
    """Share `total` bytes out by weight, within what each claim allows: nobody gets more while another who could take it has less.

    Raises:
        BudgetError: not even the least of all fits; `minimum` is what would do.
    """
    least = sum(claim.least for claim in claims)
    if least > total:
        raise BudgetError(f"{least} bytes are the least, and there are {total}", minimum=least)

    def taken(level: float) -> int:
        return sum(claim.at(level) for claim in claims)

    low, high = 0.0, total / min((claim.weight for claim in claims), default=1.0) + 1.0
    for _ in range(100):  # halves until neighbouring floats, at most
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) <= total else (low, middle)
    return {claim.name: claim.at(low) for claim in claims}


class Grants:
    """Who holds how many bytes of a total. A grant that would pass it is refused before it is made.

    Attributes:
        total: bytes in all.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._granted: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self.total - sum(self._granted.values())

    def of(self, name: str) -> int:
        """Bytes that one holds."""
        return self._granted.get(name, 0)

    def set(self, name: str, size: int) -> None:
        """From here on, `name` holds `size` bytes; 0: none.

        Raises:
            BudgetError: more than are free.
        """
        more = size - self.of(name)
        if more > self.free:
            raise BudgetError(f"{name!r} would need {format_bytes(more)} more, and {format_bytes(self.free)} are free")
        if size:
            self._granted[name] = size
        else:
            self._granted.pop(name, None)


def refusal(claim: Claim, others: Iterable[Claim], grants: Grants, reasons: Iterable[Exception]) -> BudgetError:
    """Why there is no room for a claim: what it needs at least, what is free, what the others cannot go below, and `reasons` besides."""
    below = format_bytes(sum(one.least for one in others))
    return BudgetError(
        f"no room for the session {claim.name!r}: it needs at least {format_bytes(claim.least)} ({claim.least} bytes), and of "
        f"{format_bytes(grants.total)} {format_bytes(grants.free)} are free; the other sessions that are in memory cannot go below "
        f"{below} in all: close one, or open them with a smaller budget or least{''.join(f'; {reason}' for reason in reasons)}",
        minimum=claim.least,
    )
