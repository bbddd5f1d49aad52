"""Make the file of handwritten digits that generated streams show: `python -m training.minnow.digits`; needs the `train` extra."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from millpond.eval.streams import digits

__all__ = ["arrays", "main"]


def arrays() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scikit-learn's digits: images uint8 [1797, 8, 8] in 0..16, and labels uint8 [1797]."""
    loaded = load_digits()
    return loaded.images.astype(np.uint8), loaded.target.astype(np.uint8)


def main() -> None:
    images, labels = arrays()
    np.savez_compressed(digits.FILE, images=images, labels=labels)


if __name__ == "__main__":
    main()
