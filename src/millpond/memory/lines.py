"""A line of the budget: one consumer, with the slots and bytes that it may take, and what for.

A plan is a list of lines, and the ledger's accounts are those that lines name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millpond.memory.geometry import Geometry

STORAGE = "storage"
"""The account of everything that is allocated once for tokens: slots, and tokens that are stored quantized."""


@dataclass(frozen=True)
class Line:
    """What one consumer may take.

    Attributes:
        name: the consumer, unlike any other line's of the plan.
        slots: token slots; 0 for what is no token of the cache.
        bytes: all that it takes, its slots included.
        purpose: what for, in a few words.
        account: where the ledger enters it; by default an account of its own, called as the line. Lines that share one, as all slots
            share `STORAGE`, are bounded together.
    """

    name: str
    slots: int
    bytes: int
    purpose: str
    account: str = ""

    def __post_init__(self) -> None:
        if not self.account:
            object.__setattr__(self, "account", self.name)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`; without the ledger's account."""
        return {"name": self.name, "slots": self.slots, "bytes": self.bytes, "purpose": self.purpose}


def slot_line(geometry: Geometry, name: str, slots: int, purpose: str) -> Line:
    """A consumer of `slots` token slots and nothing else."""
    return Line(name, slots, slots * geometry.bytes_per_token, purpose, STORAGE)
