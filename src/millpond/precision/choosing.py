"""All decisions that read one input, made together: the input is normed once and measured once (DP-LLM, section 4).

One call into compiled code decides for q, k and v, or for gate and up; in Python each would cost as much as a small product. The torch
code says the same and is used where there is no compiler and on other devices. Knows choices and tensors, not models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millpond.native.build import compiled
from millpond.precision.calibration import Choice

__all__ = ["Chooser", "plain_norm"]

_KERNEL = Path(__file__).with_name("choose.cpp")


_ONE = (torch.tensor([False]), torch.tensor([True]))


class _Group(ctypes.Structure):
    """As in choose.cpp."""

    _fields_ = (
        ("columns", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("g", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("intercept", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
    )


class Chooser:
    """Decides for several linears from one input.

    Args:
        choices: of the linears.
        columns: K of that input.
        norm: the module that stands between the given input and the one that the estimates read; None for none.
    """

    def __init__(self, choices: Sequence[Choice], columns: int, norm: Any = None) -> None:
        self.choices, self.norm = tuple(choices), norm
        library = compiled(_KERNEL)[0]
        scale, epsilon = (None, 0.0) if norm is None else plain_norm(norm)
        self._decide = None
        if library is not None and (norm is None or scale is not None):  # another kind of norm is called, not copied
            self._decide = library.millpond_choose
            self._decide.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
            self._decide.restype = None
        drawn = [None if one.projection is None else one.projection.bfloat16().contiguous() for one in self.choices]
        count = len(self.choices)
        floats = ctypes.c_float * count
        tables = (
            (ctypes.c_void_p * count)(*(None if one is None else one.data_ptr() for one in drawn)),
            (ctypes.c_int64 * count)(*(0 if one is None else one.shape[0] for one in drawn)),
            floats(*(one.slope for one in self.choices)),
            floats(*(one.intercept for one in self.choices)),
            floats(*(one.threshold for one in self.choices)),
        )
        self._kept = (scale, drawn, tables)  # alive as long as their addresses are used
        addresses = [ctypes.addressof(table) for table in tables]
        self._group = _Group(columns, count, None if scale is None else scale.data_ptr(), epsilon, *addresses)
        self._where = ctypes.addressof(self._group)
        self._single = (ctypes.c_uint8 * count)()
        self._single_where = ctypes.addressof(self._single)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Rows [T, K] -> for each linear bool [T], True for the high width."""
        if self._decide is None or x.device.type != "cpu":
            read = x if self.norm is None else self.norm.forward(x)
            return [choice.estimate(read) > choice.threshold for choice in self.choices]
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        rows = x.shape[0]
        if rows == 1:  # a decoding step: nothing is allocated
            self._decide(self._where, x.data_ptr(), 1, self._single_where)
            return [_ONE[high] for high in self._single]
        out = torch.empty(len(self.choices), rows, dtype=torch.bool)
        self._decide(self._where, x.data_ptr(), rows, out.data_ptr())
        return out.unbind()


@torch.no_grad()
def plain_norm(norm: Any) -> tuple[Tensor | None, float]:
    """Weight (float32) and epsilon of a module that is x / rms(x) * weight; None for the weight where it is anything else."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.device.type != "cpu":
        return None, 0.0
    scale = weight.float().contiguous()
    x = torch.linspace(-2, 3, len(scale))[None].to(weight.dtype)
    want = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon) * scale
    close = torch.allclose(norm.forward(x).float(), want, rtol=0.02, atol=0.02)
    return (scale, float(epsilon)) if close else (None, 0.0)
