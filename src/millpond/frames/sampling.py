"""Choosing frames by their own times. Knows nothing about where they come from, and never looks at a wall clock."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError

# Containers round times (Matroska to 1 ms); a frame that is early by less belongs to the tick it was meant for.
_EARLY_SECONDS = 0.002
_EARLY_SHARE = 0.05
_MOST_FPS = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A frame that is decoded but not yet turned into RGB, so that frames nobody takes cost little.

    Attributes:
        seconds: stream time.
        render: makes the picture, uint8 [H, W, 3] RGB; raises SourceError.
    """

    seconds: float
    render: Callable[[], NDArray[np.uint8]]


def check_fps(fps: float | None) -> None:
    """Raise SourceError unless fps is None, or a number above 0 and at most a million."""
    if fps is None:
        return
    if isinstance(fps, bool) or not isinstance(fps, float | int | np.floating | np.integer):
        raise SourceError(f"fps must be a number above 0, or None for every frame, not {type(fps).__name__}")
    if not 0 < fps <= _MOST_FPS:
        raise SourceError(f"fps must be above 0 and at most {_MOST_FPS:,}, or None for every frame, not {fps}")


def sample(pictures: Iterable[Pending], fps: float | None) -> Iterator[Pending]:
    """Take the first frame at or after each tick k / fps, counted from the first frame; None takes every frame.

    A frame is taken once and keeps its own time: a gap is not filled, and a source slower than `fps` passes unchanged.
    The time of a frame may be early by 2 ms, or 5 % of a tick if that is less, to allow for rounding in containers.

    Args:
        pictures: times ascending.
        fps: ticks per second, above 0.
    """
    if fps is None:
        yield from pictures
        return
    early = min(_EARLY_SECONDS, _EARLY_SHARE / fps)
    origin, tick = None, 0
    for picture in pictures:
        if origin is None:
            origin = picture.seconds
        passed = math.floor((picture.seconds - origin + early) * fps)
        if passed >= tick:
            tick = passed + 1
            yield picture
