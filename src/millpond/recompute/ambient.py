"""What surrounds a step and must be the same when it runs again: random number generators and autocast.

Knows PyTorch's global states; nothing about steps, plans or graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Autocast", "Generators", "RngState"]


@dataclass(frozen=True)
class RngState:
    """States of PyTorch's generators: the CPU's, and one per CUDA device used."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that keeping it takes."""
        return sum(state.nbytes for state in (self.cpu, *self.cuda))

    def equals(self, other: RngState) -> bool:
        """Whether nothing was drawn in between."""
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.cuda, other.cuda))


class Generators:
    """PyTorch's default generators of the CPU and of the devices on which the given leaves lie.

    Python's and numpy's generators are not covered.
    """

    def __init__(self, leaves: Iterable[Any]) -> None:
        self._cuda = sorted({leaf.device.index for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda})

    def get(self) -> RngState:
        """The current states."""
        return RngState(torch.get_rng_state(), tuple(torch.cuda.get_rng_state(device) for device in self._cuda))

    def set(self, state: RngState) -> None:
        """Go back to earlier states."""
        torch.set_rng_state(state.cpu)
        for device, held in zip(self._cuda, state.cuda, strict=True):
            torch.cuda.set_rng_state(held, device)


@dataclass(frozen=True)
class Autocast:
    """Autocast as it was in the forward pass: (device type, enabled, dtype) and whether casts are cached."""

    devices: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def current(cls, leaves: Iterable[Any]) -> Autocast:
        """The state in force here, for the CPU and the device types of the given leaves."""
        types = sorted({"cpu"} | {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
        supported = [kind for kind in types if torch.amp.is_autocast_available(kind)]
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in supported),
            torch.is_autocast_cache_enabled(),
        )

    @property
    def active(self) -> bool:
        """Whether anything is cast."""
        return any(enabled for _, enabled, _ in self.devices)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same state again, inside the backward."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.devices:
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype if enabled else None, cache_enabled=self.cache)
                )
            yield
