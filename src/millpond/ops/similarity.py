"""How unlike its head's common direction each key is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from millpond.ops.c_functions import CFunction, contiguous, contiguous_rows
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_DISTINCTIVENESS = CFunction("similarity.cpp", "distinctiveness", "pnnp", by_dtype=True)


@operation
def distinctiveness(keys: Tensor, chunk: int, out: Tensor) -> None:
    """Write -cos(k, mean of the unit keys) of one head's keys [n, D] to `out`, float32 [n]; `chunk` keys at a time."""
    common = normalize(mean_unit_key(keys, chunk), dim=0)
    for part, score in zip(keys.split(chunk), out.split(chunk), strict=True):
        score.copy_(normalize(part.float(), dim=1) @ common).neg_()


@distinctiveness.kernel("cpu")
def _distinctiveness(keys: Tensor, chunk: int, out: Tensor) -> Declined | None:
    run = _C_DISTINCTIVENESS.of(keys.dtype)
    if run is None or not (contiguous_rows(keys) and contiguous(out)):
        return DECLINED
    run(keys.data_ptr(), *keys.shape, out.data_ptr())
    return None


def mean_unit_key(keys: Tensor, chunk: int) -> Tensor:
    """The mean of k / ||k|| over one head's keys [n, D]: float32 [D]; `chunk` keys at a time."""
    total = torch.zeros(keys.shape[1], device=keys.device)
    for part in keys.split(chunk):
        total += normalize(part.float(), dim=1).sum(0)
    return total / len(keys)
