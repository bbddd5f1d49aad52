"""How a picture is to be shown: turned by the display matrix of its container, with square pixels. Knows nothing about times or files."""

from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from numpy.typing import NDArray

_ODDEST_ASPECT = 4


def upright(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Apply the linear part (a, b, c, d) of a display matrix: x' = a x + c y, y' = b x + d y (ISO/IEC 14496-12, 6.2.2).

    A turn that is not by a quarter goes to the nearest one; scale is ignored.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3] or [W, H, 3], contiguous.
    """
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        pixels = pixels.transpose(1, 0, 2)
        across, down = c, b
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


class Turn:
    """The display matrix of a run of pictures, read from one of them and again only where the turn changes.

    PyAV's side data and its picture hold each other: every picture that was asked would stay in memory until the garbage
    collector comes by, which a decoder of large pictures cannot wait for.
    """

    def __init__(self) -> None:
        self._rotation: int | None = None
        self._matrix = (1, 0, 0, 1)

    def of(self, picture: Any) -> tuple[int, int, int, int]:
        """The linear part (a, b, c, d) of the display matrix of an `av.VideoFrame`; the identity where it has none."""
        if picture.rotation != self._rotation:
            self._rotation = picture.rotation
            data = picture.side_data.get(SideData.DISPLAYMATRIX)
            if data is None:
                self._matrix = (1, 0, 0, 1)
            else:
                a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
                self._matrix = (a, b, c, d)
        return self._matrix


def square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size in square pixels of a picture whose pixels have another shape; nothing is made smaller.

    Args:
        aspect: width of a pixel over its height; None, 0 and what no camera has (a damaged header) count as square.
    """
    if not aspect or not 1 / _ODDEST_ASPECT <= aspect <= _ODDEST_ASPECT:
        return width, height
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)
