"""Whether a picture is of the kind that Minnow was trained on. Looks at pixels only; knows nothing about the model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EDGE = 64  # of the drawings' sides, in pixels
# Shades of 5 bits a channel. Drawings at every level, also through MP4, have up to 258, and up to a fifth of one shade.
_SHADE_BITS = 5
_MOST_SHADES = 350
_GREATEST_SHARE = 0.35


def familiar(pixels: NDArray[np.uint8]) -> bool:
    """Whether uint8 [H, W, 3] could be a drawing of `millpond.eval.streams`: its size, few shades, none of which fills the picture."""
    if pixels.shape[:2] != (_EDGE, _EDGE):
        return False
    shades = pixels.astype(np.int64) >> (8 - _SHADE_BITS)
    codes = (shades[..., 0] << 2 * _SHADE_BITS) | (shades[..., 1] << _SHADE_BITS) | shades[..., 2]
    counts = np.bincount(codes.ravel())
    return bool(np.count_nonzero(counts) <= _MOST_SHADES and counts.max() <= _GREATEST_SHARE * codes.size)
