"""stand-in until the room is built"""

from collections.abc import Iterable, Iterator
from typing import Any

from millpond.frames.frame import Frame
from millpond.frames.writer import write_mp4

__all__ = ["Frame", "open", "write_mp4"]


class _Source:
    dropped = 0

    def __init__(self, frames: Iterable[Any]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            yield frame if isinstance(frame, Frame) else Frame(*frame)


def open(source: Iterable[Any], fps: float | None = None) -> _Source:
    return _Source(source)
