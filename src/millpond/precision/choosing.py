"""All decisions that read one input, made together: the input is normed once and measured once (DP-LLM, section 4).

One call into compiled code decides for q, k and v, or for gate and up; in Python each would cost as much as a small product. The torch
code says the same and is used where there is no compiler and on other devices. Knows choices and tensors, not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from millpond import ops
from millpond.ops.width_choice import Estimators, rms_norm
from millpond.precision.calibration import Choice


class Chooser:
    """Decides for several linears from one input.

    Args:
        choices: of the linears.
        columns: K of that input.
        norm: the module that stands between the given input and the one that the estimates read; None for none.
    """

    def __init__(self, choices: Sequence[Choice], columns: int, norm: Any = None) -> None:
        scale, epsilon = (None, 0.0) if norm is None else plain_norm(norm)
        self._norm = norm if scale is None else None  # another kind of norm is called, not copied
        lines = [(one.slope, one.intercept, one.threshold) for one in choices]
        self._estimators = Estimators(columns, lines, [one.projection for one in choices], scale, epsilon)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Rows [T, K] -> for each linear bool [T], True for the high bit-width."""
        return ops.exceed(x if self._norm is None else self._norm.forward(x), self._estimators)


@torch.no_grad()
def plain_norm(norm: Any) -> tuple[Tensor | None, float]:
    """Weight (float32) and epsilon of a module that is x / rms(x) * weight; None for the weight where it is anything else."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.device.type != "cpu":
        return None, 0.0
    scale = weight.float().contiguous()
    x = torch.linspace(-2, 3, len(scale))[None].to(weight.dtype)
    close = torch.allclose(norm.forward(x).float(), rms_norm(x, scale, epsilon), rtol=0.02, atol=0.02)
    return (scale, float(epsilon)) if close else (None, 0.0)
