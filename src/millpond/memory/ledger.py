"""The books: who holds how many bytes of the cap at this instant, and the most there ever was.

Every holder (storage, frames in waiting, compaction scratch) has an account. An entry that would overrun the cap is
refused before it is made. Knows numbers only; tests measure the same bytes independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes

__all__ = ["Ledger"]


class Ledger:
    """Accounts under one cap.

    Args:
        limit: the cap in bytes; None for the uncapped reference.

    Attributes:
        peak: the largest total since the cap was last lowered below it, in bytes; never above the cap.
    """

    def __init__(self, limit: int | None) -> None:
        self.peak = 0
        self._accounts: dict[str, int] = {}
        self._limit = limit

    @property
    def limit(self) -> int | None:
        """The cap in bytes; a peak above a smaller one belongs to the past."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        if limit is not None and self.peak > limit:
            self.peak = self.held

    @property
    def held(self) -> int:
        """Bytes held now, over all accounts."""
        return sum(self._accounts.values())

    def account(self, name: str) -> int:
        """Bytes held now in one account."""
        return self._accounts.get(name, 0)

    def hold(self, name: str, size: int) -> None:
        """Set an account to `size` bytes.

        Raises:
            BudgetError: the total would pass the cap; the books stay as they were.
        """
        total = self.held - self.account(name) + size
        if self._limit is not None and total > self._limit:
            raise BudgetError(
                f"{name} would need {format_bytes(size)}, which makes {total} bytes in all, over the budget of {self._limit}",
                minimum=total,
            )
        self.peak = max(self.peak, total)
        self._accounts[name] = size

    @contextmanager
    def borrow(self, name: str, size: int) -> Iterator[None]:
        """Hold `size` bytes in an account, which is empty otherwise, for the duration of a `with` block."""
        try:
            self.hold(name, size)
            yield
        finally:
            self._accounts[name] = 0
