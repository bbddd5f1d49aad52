"""Whether a step that runs again gives what it gave the first time.

Gradients from a step that did something else the second time would be wrong without a sign: a generator of its own, a
module out of reach that was put into eval mode, a changed global. So the forward pass notes one number for every tensor
that a step returns, its sum, and the backward pass compares. Knows tensors; nothing about plans or graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millpond.errors import RecomputeError


@dataclass(frozen=True)
class _Sums:
    """One tensor of every step's result, each [length]: its sum in the forward pass and when run again, and its norm.

    The norm is infinite where a step has not run again, so that no difference counts.
    """

    first: Tensor
    again: Tensor
    norms: Tensor
    tolerance: float


class Fingerprints:
    """The sums of what every step returned; three numbers a step and tensor, on the tensor's device.

    Args:
        length: steps T.
        precision: dtype that autocast computes in; None where nothing is cast.
    """

    def __init__(self, length: int, precision: torch.dtype | None) -> None:
        self._length, self._precision = length, precision
        self._sums: list[_Sums] = []

    def record(self, step: int, results: Iterable[Any]) -> None:
        """Note what step `step`, from 1, returned in the forward pass."""
        for at, tensor in enumerate(_real(results)):
            if at == len(self._sums):
                self._sums.append(self._empty(tensor))
            first = self._sums[at].first
            first[step - 1] = tensor.sum(dtype=first.dtype)

    def compare(self, step: int, results: Iterable[Any]) -> None:
        """Note what it returned when it ran again."""
        for sums, tensor in zip(self._sums, _real(results), strict=False):
            sums.again[step - 1] = tensor.sum(dtype=sums.again.dtype)
            sums.norms[step - 1] = torch.linalg.vector_norm(tensor, dtype=sums.norms.dtype)

    def verify(self) -> None:
        """Raise RecomputeError if a step that ran again returned something else.

        Half of the digits have to agree: kernels may differ with and without a graph.
        """
        for sums in self._sums:
            # Two independent errors of relative size e in n elements move the sum by e times the norm. NaN is no evidence.
            differ = (sums.first - sums.again).abs() > sums.tolerance * sums.norms
            if differ.any():
                raise RecomputeError(
                    f"step {int(differ.nonzero()[0]) + 1} returned something else when it ran again for the backward pass, "
                    "so its gradients would be wrong: a step may depend on its input, its state, its modules and torch's "
                    "default random generators only, not on a torch.Generator of its own, Python's or numpy's random "
                    "numbers, or anything that changed since the forward pass"
                )

    def _empty(self, tensor: Tensor) -> _Sums:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        first, again, norms = (
            torch.full((self._length,), value, dtype=dtype, device=tensor.device) for value in (0.0, 0.0, torch.inf)
        )
        eps = max(torch.finfo(kind).eps for kind in (tensor.dtype, self._precision) if kind is not None)
        return _Sums(first, again, norms, eps**0.5)


def _real(results: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors that carry gradients, detached, as real numbers."""
    for result in results:
        if isinstance(result, Tensor) and result.is_complex():
            yield torch.view_as_real(result.detach())
        elif isinstance(result, Tensor) and result.is_floating_point() and result.element_size() > 1:
            yield result.detach()
