"""A cell of the table: one policy under one budget. Knows nothing about streams or models."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from millpond import policies
from millpond.config import Positions
from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes, parse_bytes

LAST_FRAMES = "last-4-frames"
"""Not a policy: the model sees the last four frames before a question and nothing else, in a full cache."""
REFERENCES = ("full", LAST_FRAMES, "uniform", "recent")
"""In every table: what forgetting nothing, remembering nothing and not looking at content are worth."""


@dataclass(frozen=True)
class Cell:
    """One column of a trial.

    Attributes:
        policy: a policy with its parameters as `millpond.policies.read` takes it, or `LAST_FRAMES`.
        budget: share of the full cache (a `Fraction`), bytes (int), or None where there is no cap.
        positions, recent_frames: as in `millpond.Session`.
    """

    policy: str
    budget: Fraction | int | None
    positions: Positions
    recent_frames: int = 0

    @property
    def name(self) -> str:
        """Unique, readable, and what a resumed study recognises a finished trial by."""
        recent = f", {self.recent_frames} recent frames" if self.recent_frames else ""
        return f"{self.policy} @ {'-' if self.budget is None else self.budget} {self.positions}{recent}"

    @property
    def budget_name(self) -> str:
        """For tables."""
        if self.budget is None:
            return "-"
        return str(self.budget) if isinstance(self.budget, Fraction) else format_bytes(self.budget)

    def bytes_of(self, full_cache_bytes: int) -> int | None:
        """The budget in bytes for a stream whose full cache takes that many."""
        if isinstance(self.budget, Fraction):
            return int(self.budget * full_cache_bytes)
        return self.budget


def read_budget(text: str) -> Fraction | int:
    """Read `1/16` (a share of the full cache) or `256KiB` (bytes).

    Raises:
        BudgetError: neither.
    """
    if "/" not in text:
        return parse_bytes(text)
    try:
        share = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise BudgetError(f"{text!r} is neither a share such as 1/16 nor a size such as 256KiB") from None
    if not 0 < share <= 1:
        raise BudgetError(f"a share of the full cache lies above 0 and at most at 1, not {text}")
    return share


def read_cells(names: list[str], budgets: list[str], positions: Positions, recent_frames: int = 0) -> list[Cell]:
    """Every capped policy under every budget, and the uncapped references once.

    Raises:
        PolicyError, BudgetError: a name or a size that cannot be read.
    """
    shares = [read_budget(text) for text in budgets]
    cells: list[Cell] = []
    for name in names:
        if name != LAST_FRAMES and policies.read(name).capped:
            cells += [Cell(name, share, positions, recent_frames) for share in shares]
        else:
            # The last frames by themselves are the reference without a memory: no recent frames to show.
            cells.append(Cell(name, None, positions, 0 if name == LAST_FRAMES else recent_frames))
    return list(dict.fromkeys(cells))
