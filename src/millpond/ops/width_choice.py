"""Which of two widths each of several linears reads, decided from the one input that they share: an optional RMS norm, then an estimate
for each linear, a line in the input's length or the length of a projection, against its threshold."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_EXCEED = CFunction("width_choice.cpp", "exceed", "ppnp")
_ONE = (torch.tensor([False]), torch.tensor([True]))


def estimate(x: Tensor, projection: Tensor | None, slope: float, intercept: float) -> Tensor:
    """||G x|| with a projection G [k, K], else slope * ||x|| + intercept: rows [T, K] -> float32 [T]."""
    rows = x.float()
    if projection is not None:
        rows = rows @ projection.float().T
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm if projection is not None else norm * slope + intercept


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * scale, in float32."""
    floats = x.float()
    return floats * torch.rsqrt(floats.square().mean(-1, keepdim=True) + epsilon) * scale


class _Group(ctypes.Structure):
    """As in width_choice.cpp."""

    _fields_ = (
        *(
            ("columns", ctypes.c_int64),
            ("count", ctypes.c_int64),
            ("scale", ctypes.c_void_p),
            ("epsilon", ctypes.c_float),
        ),
        *((name, ctypes.c_void_p) for name in ("g", "k", "slope", "intercept", "threshold")),
    )


class Estimators:
    """What does not change from one input to the next, laid out once.

    Args:
        columns: K of the input. lines: for each linear slope, intercept and threshold.
        projections: for each linear bfloat16 [k, K], or None for the line.
        scale, epsilon: of an RMS norm in front of the estimates, float32 [K]; None for none.
    """

    def __init__(
        self,
        columns: int,
        lines: Sequence[tuple[float, float, float]],
        projections: Sequence[Tensor | None],
        scale: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> None:
        self.lines, self.scale, self.epsilon = tuple(lines), scale, epsilon
        self.projections = [None if one is None else one.bfloat16().contiguous() for one in projections]
        count = len(self.lines)
        floats = ctypes.c_float * count
        self._tables: tuple[ctypes.Array[Any], ...] = (  # alive as long as their addresses are used
            (ctypes.c_void_p * count)(*(None if one is None else one.data_ptr() for one in self.projections)),
            (ctypes.c_int64 * count)(*(0 if one is None else len(one) for one in self.projections)),
            *(floats(*column) for column in zip(*self.lines, strict=True)),
        )
        addresses = [ctypes.addressof(table) for table in self._tables]
        self._group = _Group(columns, count, None if scale is None else scale.data_ptr(), epsilon, *addresses)
        self.address = ctypes.addressof(self._group)
        self.single = (ctypes.c_uint8 * count)()
        self.single_address = ctypes.addressof(self.single)
        held = [one for one in (scale, *self.projections) if one is not None]
        self.on_cpu = all(one.is_cpu for one in held)


@operation
def exceed(x: Tensor, estimators: Estimators) -> Sequence[Tensor]:
    """Whether each linear's estimate lies above its threshold: rows [T, K] -> for each linear bool [T]."""
    read = x if estimators.scale is None else rms_norm(x, estimators.scale, estimators.epsilon)
    pairs = zip(estimators.lines, estimators.projections, strict=True)
    return [estimate(read, projection, slope, intercept) > limit for (slope, intercept, limit), projection in pairs]


@exceed.kernel("cpu")
def _exceed(x: Tensor, estimators: Estimators) -> Sequence[Tensor] | Declined:
    run = _C_EXCEED.of()
    if run is None or not estimators.on_cpu:
        return DECLINED
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    rows = x.shape[0]
    if rows == 1:  # a decoding step: nothing is allocated
        run(estimators.address, x.data_ptr(), 1, estimators.single_address)
        return [_ONE[high] for high in estimators.single]
    out = torch.empty(len(estimators.lines), rows, dtype=torch.bool)
    run(estimators.address, x.data_ptr(), rows, out.data_ptr())
    return out.unbind()
