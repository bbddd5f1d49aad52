"""Changes in place that can be taken up again wherever they were interrupted, so that what has begun is always finished.

Python can be interrupted between any two steps (Ctrl-C, memory that runs out), and an interrupted move in place cannot be undone
without a copy of what it overwrote. So every move here can be run again: it goes on where it stopped, and when it is complete, running
it changes nothing.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from millpond.errors import MillpondError

T = TypeVar("T")
Step = Callable[[], None]
"""A part of a change. It can be repeated, whole or in part, until the next one begins."""


class Move(Protocol):
    """Something prepared that can be run until it is complete, as often as it takes."""

    def run(self) -> None: ...


class Steps:
    """Steps one after the other, forgotten when they are done: they may hold whoever holds this, and tensors with them.

    Args:
        steps: those; or what works them out when their time comes, from what they are about to change.
    """

    def __init__(self, steps: Iterable[Step] | Callable[[], Iterable[Step]]) -> None:
        self._prepare = steps if callable(steps) else None
        self._steps = [] if callable(steps) else list(steps)
        self._at = 0

    def run(self) -> None:
        if self._prepare is not None:
            self._steps, self._prepare = list(self._prepare()), None
        while self._at < len(self._steps):
            self._steps[self._at]()
            self._at += 1
        self._steps = []


class Transactional:
    """Base of what is changed in place by moves, one at a time: one that has begun is finished before anything else is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._move: Move | None = None  # that has begun and is not finished

    @property
    def moving(self) -> bool:
        """Whether a move has begun and is still to be finished."""
        return self._move is not None

    def carry_out(self, move: Move) -> None:
        """Carry a prepared move out: once begun it is finished, also when it is interrupted, before the interruption goes on."""
        try:
            self._move = move
            move.run()
            self._move = None
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what they worked on goes: its bytes are needed again
            with suppress(Exception):  # what `finish` says then is said by every call from now on
                self.finish()
            raise

    def finish(self) -> None:
        """Finish a move that was interrupted, if one was; everything that reads or changes the memory begins with it.

        Raises:
            MillpondError: it cannot be finished, for lack of memory most likely. The next call tries again.
        """
        if self._move is None:
            return
        try:
            self._move.run()
        except Exception as error:
            what = f"it was interrupted while it moved, and going on fails ({error}); every call tries again"
            raise MillpondError(f"the memory cannot be used: {what}") from error
        self._move = None


class Pieces:
    """Pieces of a tensor that are worked out from what they replace: each is kept until it is written, and only then counted."""

    def __init__(self) -> None:
        self._state: tuple[int, tuple[Any, ...] | None] = 0, None

    def run(self, count: int, make: Callable[[int], tuple[Any, ...]], write: Callable[..., None]) -> None:
        """Do all pieces that have not been done.

        Args:
            make: works piece i out; changes nothing. write: takes i and what `make` gave, and writes it; can be repeated.
        """
        at, made = self._state
        while at < count:
            if made is None:
                made = make(at)
                self._state = at, made
            write(at, *made)
            at, made = at + 1, None
            self._state = at, None


class Progress:
    """How far an operation in place has come, so that it can be run again, with the same arguments, where it was interrupted.

    Attributes:
        count: what compiled code has done; counted by itself, so that no interruption comes between.
        pieces: what torch has done.
    """

    def __init__(self) -> None:
        self.count = ctypes.c_int64(0)
        self.pieces = Pieces()
        self._made: Any = None

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives, worked out before anything has changed and then remembered."""
        if self._made is None:
            self._made = (make(),)
        made: T = self._made[0]
        return made


class InPlace:
    """An operation in place (`millpond.ops`) as a `Move`.

    Args:
        operation: takes the arguments and a `Progress`.
    """

    def __init__(self, operation: Callable[..., None], *arguments: Any) -> None:
        self._operation, self._arguments, self._progress = operation, arguments, Progress()

    def run(self) -> None:
        self._operation(*self._arguments, progress=self._progress)


class Mask:
    """A selection in one bit an index, for what has to wait until all selections are made.

    Args:
        keep: int64 [H, S], ascending. size: n, indices to choose from.

    Attributes:
        kept: S.
    """

    def __init__(self, keep: Tensor, size: int) -> None:
        self.kept, self._size, self._device = keep.shape[1], size, keep.device
        chosen = np.zeros((len(keep), size), dtype=np.bool_)
        chosen[np.arange(len(keep))[:, None], keep.cpu().numpy()] = True
        self._bits = np.packbits(chosen, axis=1)

    def indices(self) -> Tensor:
        """The selection as it was given, int64 [H, S]."""
        heads = len(self._bits)
        chosen = np.unpackbits(self._bits, axis=1, count=self._size).view(np.bool_)
        keep = np.flatnonzero(chosen).reshape(heads, self.kept)
        keep -= np.arange(heads)[:, None] * self._size
        return torch.from_numpy(keep).to(self._device)
