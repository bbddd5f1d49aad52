"""Real handwritten digits, so that not everything in a stream is drawn by us.

The 1,797 images of 8 x 8 pixels are those of scikit-learn's `load_digits`: the test part of "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0). They lie here as `digits.npz`, so
that streams need no scikit-learn. Split by image: indices divisible by 5 are for test streams, those that leave 1 for
validation, the rest for training. Knows nothing about scenes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("digits.npz")


@cache
def _arrays() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(FILE) as stored:
        return stored["images"], stored["labels"]


@cache
def digit_indices(split: str) -> NDArray[np.int64]:
    """Indices of the images that streams of `split` ("train", "validation" or "test") may show, int64 [n]."""
    rest = np.arange(len(_arrays()[1])) % 5
    chosen = {"test": rest == 0, "validation": rest == 1}.get(split, rest >= 2)
    return np.flatnonzero(chosen)


def digit_value(index: int) -> int:
    """What was written, 0 to 9."""
    return int(_arrays()[1][index])


@cache
def digit_mask(index: int) -> NDArray[np.float32]:
    """Opacity of the strokes, float32 [16, 16] in 0..1 (each of the 8 x 8 pixels twice, both ways)."""
    image = _arrays()[0][index].astype(np.float32) / 16
    return np.kron(image, np.ones((2, 2), dtype=np.float32))
