"""How much a key points in the common direction of one head's keys. Knows neither time nor place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from millpond import native
from millpond.policies.base import Shape

__all__ = ["distinctiveness", "mean_unit_key", "unit_keys_scratch"]


def distinctiveness(keys: Tensor, chunk: int, out: Tensor) -> None:
    """Write -cos(k, mean of the unit keys) of one head's keys [n, D] to `out`, float32 [n]; `chunk` keys at a time."""
    if native.distinctiveness(keys, out):
        return
    common = normalize(mean_unit_key(keys, chunk), dim=0)
    for part, score in zip(keys.split(chunk), out.split(chunk), strict=True):
        score.copy_(normalize(part.float(), dim=1) @ common).neg_()


def mean_unit_key(keys: Tensor, chunk: int) -> Tensor:
    """The mean of k / ||k|| over one head's keys [n, D]: float32 [D]; `chunk` keys at a time."""
    total = torch.zeros(keys.shape[1], device=keys.device)
    for part in keys.split(chunk):
        total += normalize(part.float(), dim=1).sum(0)
    return total / len(keys)


def unit_keys_scratch(shape: Shape) -> int:
    """The most bytes that either function allocates, beside its result."""
    # float32: a chunk of keys and its unit keys, with norms; the mean key and its parts.
    return 4 * (2 * shape.chunk + 4) * (shape.head_dim + 2)
