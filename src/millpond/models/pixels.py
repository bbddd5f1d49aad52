"""Frames to pixel tensors: resizing, cropping and normalising as the processors do, without torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millpond.errors import ModelError, SourceError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MOST_ASPECT = 200


def check_aspect(height: int, width: int) -> None:
    """Refuse a frame that is none, and a thin one: resizing its shorter side would make the longer one enormous.

    Raises:
        SourceError: a side is no number of pixels; or one side is more than 200 times the other.
    """
    if not (isinstance(height, int | np.integer) and isinstance(width, int | np.integer) and min(height, width) > 0):
        raise SourceError(f"a frame's height and width must be whole numbers from 1 on, not {height!r} and {width!r}")
    if max(height, width) > _MOST_ASPECT * min(height, width):
        raise SourceError(
            f"a frame of {width} x {height} is too long and thin for this model (at most {_MOST_ASPECT} to 1)"
        )


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, in 8 bits, as PIL does it: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).copy()


def centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a frame that is at least as large: uint8 [height, width, 3]."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].copy()


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [n, 3, ...] -> float32 of the same shape and layout, (x / 255 - mean) / std colour by colour."""
    colours = 1, 3, *(1 for _ in pixels.shape[2:])
    scaled = pixels.to(torch.float32).mul_(1 / 255)
    return scaled.sub_(torch.tensor(mean).view(colours)).div_(torch.tensor(std).view(colours))


def by_colour(numbers: dict[str, Any], name: str, otherwise: Sequence[float]) -> tuple[float, ...]:
    """One number a colour out of a processor's, such as its `image_mean`.

    Raises:
        ModelError: it is not three finite numbers, or a deviation is not above 0.
    """
    found = numbers.get(name) or otherwise
    plain = isinstance(found, (list, tuple)) and len(found) == 3 and all(type(one) in (int, float) for one in found)
    if not plain or not all(map(math.isfinite, found)) or (name == "image_std" and min(found) <= 0):
        raise ModelError(f"the processor's {name} must be three numbers, not {found!r}")
    return tuple(float(one) for one in found)
