"""One timestamped picture, the currency of every source. Knows nothing about files, codecs or models."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture and its moment in the stream.

    A frame that was decoded owns its pixels and may be written to. A frame made from an array refers to that array:
    nothing is copied, so an array that a camera library uses again must be copied by the caller.

    Attributes:
        seconds: stream time in seconds; finite. The first frame of a file is at 0.
        pixels: uint8 [H, W, 3], RGB, upright, at the size of the source.

    Raises:
        SourceError: the time is not finite, or the array has another shape or dtype.
    """

    seconds: float
    pixels: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, float | int | np.floating | np.integer):
            raise SourceError(f"a frame's time must be a number of seconds, not {type(self.seconds).__name__}")
        if not math.isfinite(self.seconds):
            raise SourceError(f"a frame's time must be finite, not {self.seconds}")
        if not isinstance(self.pixels, np.ndarray):
            raise SourceError(f"a frame must be a numpy array, uint8 [H, W, 3], not {type(self.pixels).__name__}")
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise SourceError(f"a frame must be uint8 [H, W, 3] in RGB, not {self.pixels.dtype} {list(shape)}")

    def __repr__(self) -> str:
        height, width, _ = self.pixels.shape
        return f"Frame({self.seconds:.3f} s, {width}x{height})"
