"""Frames to pixel tensors: resizing, cropping and normalising as the processors do, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["centre_crop", "normalise", "resize"]


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, in 8 bits, as PIL does it: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).copy()


def centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a frame that is at least as large: uint8 [height, width, 3]."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].copy()


def normalise(frames: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 frames of one size, n x [H, W, 3] -> float32 [n, 3, H, W], (x / 255 - mean) / std."""
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).to(torch.float32) * (1 / 255)
    return (stacked - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
