"""One thread at a time, and an error rather than a wait for oneself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from millpond.errors import MillpondError


class Exclusive:
    """A lock that tells its own holder so when asked for again.

    Args:
        message: of the error.
    """

    def __init__(self, message: str) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._message = message

    def check(self) -> None:
        """Raises:
        MillpondError: this thread holds it.
        """
        # Both: an interrupt may have kept the owner from being taken down, never the lock from being released.
        if self._lock.locked() and self._owner == threading.get_ident():
            raise MillpondError(self._message)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it within a `with` block; other threads wait.

        Raises:
            MillpondError: this thread holds it already.
        """
        self.check()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
