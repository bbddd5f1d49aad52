"""Turning pictures upright by the display matrix of their container. Knows nothing about times or files."""

from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from numpy.typing import NDArray


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


def display_matrix(picture: Any) -> tuple[int, int, int, int]:
    """The linear part (a, b, c, d) of the display matrix of a `av.VideoFrame`; the identity where it has none."""
    data = picture.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    return (a, b, c, d)
