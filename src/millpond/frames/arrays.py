"""Frames that another program makes: any iterable of (seconds, pixels) or of `Frame`. Knows nothing about files."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.frames.frame import Frame
from millpond.frames.sampling import Pending
from millpond.frames.source import SourceInfo


class Arrays:
    """An iterable as a feed; one item is taken when it is asked for. Times are kept as they are. A `Feed`.

    Raises (while iterating):
        SourceError: an item is neither a `Frame` nor (seconds, uint8 [H, W, 3]), or times do not ascend.
        Exception: whatever the iterable itself raises.
    """

    damaged = 0

    def __init__(self, frames: Iterable[Any], *, live: bool) -> None:
        self._frames = frames
        self._cancelled = False
        self.info = SourceInfo(name="frames", kind="frames", live=live)

    def __iter__(self) -> Iterator[Pending]:
        last = None
        for index, item in enumerate(self._frames):
            if self._cancelled:
                return
            frame = item if isinstance(item, Frame) else _frame(item, index)
            if last is not None and frame.seconds <= last:
                raise SourceError(
                    f"frame {index} is at {frame.seconds:.6f} s, not after the one before it ({last:.6f} s): times must ascend"
                )
            last = frame.seconds
            yield Pending(float(frame.seconds), partial(_given, frame))

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self._cancelled = True
        self._frames = ()


def _frame(item: Any, index: int) -> Frame:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise SourceError(
            f"item {index} must be a Frame or a pair of (seconds, uint8 [H, W, 3]), not {type(item).__name__}"
        )
    return Frame(item[0], item[1])


def _given(frame: Frame) -> NDArray[np.uint8]:
    return frame.pixels
