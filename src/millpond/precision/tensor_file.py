"""Tensors of a safetensors file, read into memory of their own.

The library's own readers map the file and hand out views: one small tensor that is kept then keeps every page of the file that was touched
resident. A device's budget is kept only if what is dropped is gone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from millpond.errors import PrecisionError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: `first` ... `last` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.last - self.first


def header_of(path: Path) -> dict[str, Entry]:
    """Every tensor's entry; reads no tensor.

    Raises:
        PrecisionError: not a whole file of tensors.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            written = json.loads(file.read(size))
        entries = {}
        for name, row in written.items():
            if name != "__metadata__":
                first, last = (8 + size + int(at) for at in row["data_offsets"])
                entries[name] = Entry(DTYPES[row["dtype"]], tuple(int(n) for n in row["shape"]), first, last)
                if entries[name].nbytes != prod(entries[name].shape) * entries[name].dtype.itemsize:
                    raise ValueError(f"{name} has other bytes than its shape")
        if max((entry.last for entry in entries.values()), default=0) > path.stat().st_size:
            raise ValueError("it is cut off")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
        struct.error,
    ) as error:
        raise PrecisionError(f"{path} cannot be read: {error}") from error
    return entries


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name, all of them by default; each owns its memory and nothing stays mapped.

    Raises:
        PrecisionError: as `header_of`.
    """
    entries = header_of(path)
    found = {}
    try:
        with path.open("rb", buffering=0) as file:
            for name in entries if names is None else names:
                entry = entries[name]
                found[name] = torch.empty(entry.shape, dtype=entry.dtype)
                view = found[name].reshape(-1).view(torch.uint8).numpy().data
                file.seek(entry.first)
                while len(view):  # one call of the system reads 2 GiB at most
                    count = file.readinto(view)
                    if not count:
                        raise ValueError("it is cut off")
                    view = view[count:]
    except (OSError, ValueError, KeyError) as error:
        raise PrecisionError(f"{path} cannot be read: {error}") from error
    return found
