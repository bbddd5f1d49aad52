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


class Chooser:
    """Decides for several linears from one input.

    Args:
        choices: of the linears.
        norm: the module that stands between the given input and the one that the estimates read; None for none.
    """

    def __init__(self, choices: Sequence[Choice], norm: Any = None) -> None:
        self.choices, self.norm = tuple(choices), norm
        self._library = compiled(_KERNEL)[0]
        self._scale, self._epsilon = (None, 0.0) if norm is None else plain_norm(norm)
        if norm is not None and self._scale is None:
            self._library = None  # another kind of norm: it is called, not copied
        transposed = [None if one.projection is None else one.projection.float().T.contiguous() for one in self.choices]
        self._kept = transposed  # alive as long as their addresses are used
        count = len(self.choices)
        floats = ctypes.c_float * count
        self._arguments = (
            ctypes.c_int64(count),
            (ctypes.c_void_p * count)(*(None if one is None else one.data_ptr() for one in transposed)),
            (ctypes.c_int64 * count)(*(0 if one is None else one.shape[1] for one in transposed)),
            floats(*(one.slope for one in self.choices)),
            floats(*(one.intercept for one in self.choices)),
            floats(*(one.threshold for one in self.choices)),
        )
        scale = None if self._scale is None else self._scale.data_ptr()
        self._before = (ctypes.c_void_p(scale), ctypes.c_float(self._epsilon))

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [T, K] -> bool [linears, T], True for the high width."""
        if self._library is None or x.device.type != "cpu":
            read = x if self.norm is None else self.norm.forward(x)
            return torch.stack([choice.estimate(read) > choice.threshold for choice in self.choices])
        rows = x.float().contiguous()
        out = torch.empty(len(self.choices), len(rows), dtype=torch.bool)
        self._library.millpond_choose(
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(rows.shape[0]),
            ctypes.c_int64(rows.shape[1]),
            *self._before,
            *self._arguments,
            ctypes.c_void_p(out.data_ptr()),
        )
        return out


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
