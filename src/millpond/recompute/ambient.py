"""What surrounds a step and must be the same when it runs again: generators, autocast, and the state of its modules.

Knows PyTorch's global states and modules; nothing about steps, plans or graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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

    Python's and numpy's generators are not covered, nor is a torch.Generator of the caller's own.
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

    @property
    def precision(self) -> torch.dtype | None:
        """The coarsest dtype that is cast to; None if nothing is cast."""
        dtypes = [dtype for _, enabled, dtype in self.devices if enabled]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same state again, inside the backward."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.devices:
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype if enabled else None, cache_enabled=self.cache)
                )
            yield


@dataclass(frozen=True)
class Flags:
    """Which modules were in train mode and which leaf tensors needed gradients in the forward pass."""

    training: tuple[tuple[nn.Module, bool], ...]
    needs_grad: tuple[tuple[Tensor, bool], ...]

    @classmethod
    def current(cls, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> Flags:
        """The flags of the modules, of every module inside them, of their parameters and of further leaf tensors."""
        parts = {id(part): part for module in modules for part in module.modules()}
        parameters = [tensor for part in parts.values() for tensor in part.parameters(recurse=False)]
        leaves = {id(tensor): tensor for tensor in (*parameters, *tensors) if tensor.is_leaf}
        return cls(
            tuple((part, part.training) for part in parts.values()),
            tuple((tensor, tensor.requires_grad) for tensor in leaves.values()),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same flags again, inside the backward; afterwards those that were found."""
        training = [(part, part.training) for part, _ in self.training]
        needs_grad = [(tensor, tensor.requires_grad) for tensor, _ in self.needs_grad]
        try:
            _set_flags(self.training, self.needs_grad)
            yield
        finally:
            _set_flags(training, needs_grad)


def _set_flags(training: Iterable[tuple[nn.Module, bool]], needs_grad: Iterable[tuple[Tensor, bool]]) -> None:
    for part, mode in training:
        part.training = mode
    for tensor, needed in needs_grad:
        if tensor.requires_grad != needed:
            tensor.requires_grad = needed


class ModuleTensors:
    """The parameters and buffers of modules, which have to be the same ones, unwritten, when a step runs again."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._seen = self._look()

    def changed(self) -> str | None:
        """What was written into or replaced since, in words; None if nothing was."""
        now = self._look()
        for key, (tensor, version) in self._seen.items():
            found = now.get(key)
            if found is None or found[0] is not tensor or found[1] != version:
                return f"the {key[1]} {key[2]!r}"
        return None

    def _look(self) -> dict[tuple[int, str, str], tuple[Tensor, int]]:
        return {
            (at, kind, name): (tensor, 0 if tensor.is_inference() else tensor._version)
            for at, module in enumerate(self._modules)
            for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers()))
            for name, tensor in named
        }
