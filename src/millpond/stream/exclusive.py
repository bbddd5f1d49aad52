"""One thread at a time, first come, first served; and who may do what with a stream.

Whatever is raised while somebody waits or holds, an interrupt at any line included, those behind go on: what lets them pass is the
release of a lock at the end of a `with` block, which nothing can come between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millpond.errors import MillpondError


class _Place:
    """A thread's place in a queue.

    Attributes:
        present: locked until it leaves. before: whoever it still waits for; None once it is its turn.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.present = threading.Lock()
        self.before: _Place | None = None

    @property
    def waits(self) -> bool:
        """Whether somebody is in front."""
        before = self.before
        while before is not None and not before.present.locked():
            before = before.before  # of one that gave up
        return before is not None

    def wait(self) -> None:
        """Until all have left that came before."""
        while (before := self.before) is not None:
            with before.present:
                # One that gave up waiting leaves those whom it waited for.
                self.before = before.before


class Exclusive:
    """A lock that goes to those who wait in the order in which they came. Its holder may take it again."""

    def __init__(self) -> None:
        self._joining = threading.Lock()
        self._last: _Place | None = None
        self._holder: _Place | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread holds it."""
        holder = self._holder
        # Both: an interrupt may have kept the holder from being taken down, never its place from being left.
        return holder is not None and holder.thread == threading.get_ident() and holder.present.locked()

    @contextmanager
    def held(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold it within a `with` block.

        Args:
            waiting: called once this thread has its place in the queue, if others are in front.
        """
        if self.mine:
            yield
            return
        place = _Place()
        with place.present:
            with self._joining:
                place.before, self._last = self._last, place
            if waiting is not None and place.waits:
                waiting()
            place.wait()
            try:
                self._holder = place
                yield
            finally:
                self._holder = None


class Once(Exclusive):
    """The same for what its own holder must not begin again.

    Args:
        message: of the error.
    """

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    @contextmanager
    def held(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold it within a `with` block.

        Raises:
            MillpondError: this thread holds it already.
        """
        if self.mine:
            raise MillpondError(self._message)
        with super().held(waiting):
            yield


class Access:
    """Who may do what with one stream: three locks, always taken in this order.

    Attributes:
        stream: of whoever changes the stream: a frame, a remembered turn, another budget.
        turn: of whoever has the slots behind the memory, a question and its answer; and of what touches the memory as a whole.
        instant: of whoever is at the memory right now, for a block or a token at a time.
    """

    def __init__(self) -> None:
        self.stream, self.turn, self.instant = Exclusive(), Exclusive(), Exclusive()

    @property
    def mine(self) -> bool:
        """Whether this thread holds any of them."""
        return self.stream.mine or self.turn.mine or self.instant.mine
