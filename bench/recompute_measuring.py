"""What bench/recompute.py measures with: bytes of live tensors, seconds, and the machine that they were taken on."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Seconds", "machine", "peak_bytes", "timed"]


class Peak(TorchDispatchMode):
    """Bytes of live tensors made inside, at their peak; those shaped like a parameter are left out."""

    def __init__(self, left_out: set[torch.Size]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._left_out = left_out
        self._followed: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape not in self._left_out:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in given and storage not in self._followed:
                    self._followed.add(storage)
                    weakref.finalize(storage, self._gone, storage.nbytes())
                    self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, nbytes: int) -> None:
        self.live -= nbytes


@dataclass(frozen=True)
class Seconds:
    """Wall time, which other work on the machine stretches, and the processor's time on this process."""

    wall: float
    processor: float


def timed(run: Callable[[], None], cell: nn.Module) -> Seconds:
    cell.zero_grad(set_to_none=True)
    return stopwatch(run)


def stopwatch(run: Callable[[], None]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def peak_bytes(run: Callable[[], None], cell: nn.Module) -> int:
    cell.zero_grad(set_to_none=True)
    with Peak({parameter.shape for parameter in cell.parameters()}) as peak:
        run()
    return peak.peak


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
