"""Functions of the C++ files beside this one, each declared once: what it takes, and for which dtypes it was compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millpond.ops import build

_FOLDER = Path(__file__).parent
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
_SUFFIXES: dict[torch.dtype | None, str] = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


class CFunction:
    """One C function, looked up when it is first asked for.

    Args:
        file: its C++ file. name: without the "millpond_" that all carry, and without a dtype.
        arguments: a letter for each: p an address (an int, an array, `byref` or None), n an int64, f a float32.
        result: a letter, or nothing. by_dtype: whether there is one for float32 and one for bfloat16.
    """

    def __init__(self, file: str, name: str, arguments: str, result: str = "", *, by_dtype: bool = False) -> None:
        self._source, self._name = _FOLDER / file, f"millpond_{name}"
        self._arguments = [_TYPES[letter] for letter in arguments]
        self._result = _TYPES[result] if result else None
        self._suffixes = _SUFFIXES if by_dtype else {None: ""}
        self._found: dict[torch.dtype | None, Callable[..., Any]] | None = None

    def of(self, dtype: torch.dtype | None = None) -> Callable[..., Any] | None:
        """The function for a dtype; None where there is none, or no library."""
        if self._found is None:
            self._found = self._load()
        return self._found.get(dtype)

    def _load(self) -> dict[torch.dtype | None, Callable[..., Any]]:
        library, _ = build.compiled(self._source)
        found: dict[torch.dtype | None, Callable[..., Any]] = {}
        if library is not None:
            for dtype, suffix in self._suffixes.items():
                function = getattr(library, self._name + suffix)
                function.argtypes, function.restype = self._arguments, self._result
                found[dtype] = function
        return found


def contiguous(*tensors: Tensor) -> bool:
    """Whether all of them are contiguous on a CPU."""
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def contiguous_rows(*tensors: Tensor) -> bool:
    """Whether the rows of every [..., n, D] tensor lie one behind the other on a CPU."""
    return all(one.is_cpu and (strides := one.stride())[-1] == 1 and strides[-2] == one.shape[-1] for one in tensors)


def sources() -> list[Path]:
    """Every C++ file."""
    return sorted(_FOLDER.glob("*.cpp"))


def status() -> str:
    """One line for people: where the first library is, or why there is none."""
    return build.compiled(sources()[0])[1]
