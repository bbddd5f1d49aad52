"""A window of the latest tokens: kept whatever they score, and left out where the tokens in front of it are pooled along the stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from millpond.policies.base import Shape, View


def pool_in_front(scores: Tensor, window: int, kernel: int, pooling: Literal["avg", "max"] = "avg") -> None:
    """Pool the scores, float32 [H, n], of the tokens in front of the latest `window` over `kernel` neighbours, in place."""
    count = scores.shape[1] - window
    if count < 1:
        return
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    for row in scores[:, :count]:
        row.copy_(pool(row[None], kernel, stride=1, padding=kernel // 2)[0])


def keep_window(view: View, window: int, slots: int) -> Tensor:
    """The protected tokens and as many of the latest `window` as fit: bool [H, n]."""
    protected = view.protected.clone()
    free = slots - int(protected[0].sum())
    # In every head equally many, and no more than fit beside the protected ones.
    protected[:, max(0, view.tokens - min(window, free)) :] = True
    return protected


def window_scratch(shape: Shape) -> int:
    """The most bytes that `keep_window` allocates: its result."""
    return shape.of_all(torch.bool)
