"""One dispatch to every compiled loop: an operation is its reference in torch and the kernels that may run in its place.

    @operation
    def best(scores, slots): ...        # the reference: says what is computed, and runs anywhere

    @best.kernel("cpu")
    def _best(scores, slots): ...       # the same signature and result; DECLINED for arguments that it does not take

A caller calls `best(scores, slots)` and does not know which of them runs: the kernel for the device of the first argument, where there
is one and it takes these dtypes and layouts; the reference everywhere else, and everywhere with MILLPOND_NATIVE=0.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Declined(enum.Enum):
    """What a kernel returns for arguments that it does not take."""

    DECLINED = enum.auto()


DECLINED: Final = Declined.DECLINED
OPERATIONS: dict[str, Operation[..., Any]] = {}
"""Every operation, by name."""
kernels_enabled = os.environ.get("MILLPOND_NATIVE", "1") != "0"
"""Where this is False, every operation runs its reference."""


class Operation(Generic[P, R]):
    """A function whose first argument is a tensor, and what may run in its place on that tensor's device.

    Attributes:
        reference: in torch.
        kernels: by device type; each returns `DECLINED`, and has changed nothing, for arguments that it does not take.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.kernels: dict[str, Callable[P, R | Declined]] = {}
        self._on_cpu: Callable[P, R | Declined] | None = None
        functools.update_wrapper(self, reference)

    def kernel(self, device: str) -> Callable[[Callable[P, R | Declined]], Callable[P, R | Declined]]:
        """Register what runs on a type of device."""

        def register(kernel: Callable[P, R | Declined]) -> Callable[P, R | Declined]:
            self.kernels[device] = kernel
            self._on_cpu = self.kernels.get("cpu")
            return kernel

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if kernels_enabled:
            tensor: Any = args[0]
            # `is_cpu` is several times cheaper than the device's name: a compaction of a small model asks thousands of times.
            kernel = self._on_cpu if tensor.is_cpu else self.kernels.get(tensor.device.type)
            if kernel is not None:
                found = kernel(*args, **kwargs)
                if found is not DECLINED:
                    return found
        return self.reference(*args, **kwargs)


def operation(reference: Callable[P, R]) -> Operation[P, R]:
    """Make a torch function an operation, registered under its name."""
    made = Operation(reference)
    OPERATIONS[reference.__name__] = made
    return made
