"""How much memory there is: this machine's, this process's share of it by control groups, or a device's own.

Reads what the system says; where it says nothing, nothing is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that this process could still take on a device (default: the CPU); None where the system does not say."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device is not None and device.type != "cpu":
        return None
    found = [size for size in (_machine(), *_groups()) if size is not None]
    return min(found, default=None)


def check_memory(size: int, device: torch.device | None = None) -> None:
    """Make sure that `size` bytes more could be had.

    Raises:
        BudgetError: there is less; says how much.
    """
    there = available_memory(device)
    if there is not None and size > there:
        raise BudgetError(
            f"{format_bytes(size)} are more than the memory that there is: {format_bytes(there)} are free "
            f"on {'this machine' if device is None or device.type == 'cpu' else device}"
        )


def _machine(root: Path = Path("/proc")) -> int | None:
    """Free memory, and what the system would give up for it."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None


def _groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group that this process is in has left, those of its parents included; both versions."""
    found = []
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        below = top / path.strip("/")
        # In a container the path may be the host's, which is not mounted: then its root is this process's group.
        for folder in [below, *below.parents] if below.is_dir() else [top]:
            left = _left(folder, *names)
            if left is not None:
                found.append(left)
            if folder == top:
                break
    return found


def _left(folder: Path, most: str, used: str) -> int | None:
    try:
        limit, taken = int((folder / most).read_text()), int((folder / used).read_text())
        fields = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        # Cached files are given up before anything is refused.
        cached = sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):  # no limit reads "max"
        return None
    return max(0, limit - taken + cached)
