"""The ledger: who holds how many bytes of the cap at this instant, and the most there ever was.

Every holder (storage, waiting frames, compaction scratch) has an account that lines of the plan name. An entry that would pass the cap,
or what the lines grant its account, is refused before it is made. Tests measure the same bytes independently.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.lines import Line


class Ledger:
    """Accounts under one cap.

    Args:
        limit: the cap in bytes; None for the uncapped reference.
        lines: of the plan. Their accounts are all that there are, and each holds at most what its lines take together.

    Attributes:
        limit: the cap in bytes; a peak above a smaller one belongs to the past.
        peak: the largest total since the cap was last lowered below it, in bytes; never above the cap.
    """

    def __init__(self, limit: int | None, lines: Iterable[Line]) -> None:
        self.peak = 0
        self.limit = limit
        self._granted = _granted(lines)
        self._moving = False
        self._accounts = dict.fromkeys(self._granted, 0)
        self._entering = threading.Lock()

    def move(self, limit: int | None) -> None:
        """From here on, while storage is exchanged for that of another plan, only the total is bounded, by `limit`."""
        self._cap(limit)
        self._moving = True

    def adopt(self, limit: int | None, lines: Iterable[Line]) -> None:
        """From here on a plan's lines are in force, under `limit`."""
        self._granted = _granted(lines)
        self._accounts = dict.fromkeys(self._granted, 0) | self._accounts
        self._cap(limit)
        self._moving = False

    def _cap(self, limit: int | None) -> None:
        self.limit = limit
        if limit is not None and self.peak > limit:
            self.peak = self.held

    @property
    def held(self) -> int:
        """Bytes held now, over all accounts."""
        return sum(self._accounts.values())

    def account(self, name: str) -> int:
        """Bytes held now in one account.

        Raises:
            BudgetError: there is no such account.
        """
        self._know(name)
        return self._accounts[name]

    def hold(self, name: str, size: int) -> None:
        """Set an account to `size` bytes.

        Raises:
            BudgetError: there is no such account, it would pass what the plan grants it, or the total would pass the cap; nothing is
                entered then.
        """
        self._know(name)
        with self._entering:  # frames that wait are entered while a turn runs
            total = self.held - self._accounts[name] + size
            if self.limit is not None and total > self.limit:
                over = f"which makes {total} bytes in all, over the budget of {self.limit}"
                raise BudgetError(f"{name} would need {format_bytes(size)}, {over}", minimum=total)
            if not self._moving and size > self._granted[name]:
                raise BudgetError(f"{name} would need {size} bytes, and the plan grants it {self._granted[name]}")
            self.peak = max(self.peak, total)
            self._accounts[name] = size

    def _know(self, name: str) -> None:
        if name not in self._granted:
            raise BudgetError(f"no line of the plan has the account {name!r}; there are: {', '.join(self._granted)}")

    @contextmanager
    def borrow(self, name: str, size: int) -> Iterator[None]:
        """Hold `size` bytes in an account, which is empty otherwise, for the duration of a `with` block."""
        self._know(name)
        try:
            self.hold(name, size)
            yield
        finally:
            self._accounts[name] = 0


def _granted(lines: Iterable[Line]) -> dict[str, int]:
    """Bytes of each account."""
    granted: dict[str, int] = {}
    for line in lines:
        granted[line.account] = granted.get(line.account, 0) + line.bytes
    return granted
