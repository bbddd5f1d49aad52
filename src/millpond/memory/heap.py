"""What the C heap of glibc keeps of memory that is free already; nothing is done where the C library is another one."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGE = 128 << 10


def hold_nothing() -> None:
    """From here on, memory of 128 KiB or more goes back to the system as soon as it is freed, for the rest of the process.

    glibc begins so, but each time such a block is freed it takes larger ones from the heap, up to 32 MiB. Tensors of a forward pass then
    leave holes between those that stay, and a hole stays resident: more than what is in use at any one time. Naming a threshold, even
    glibc's own, ends that. The price is that the system clears fresh pages for every large tensor.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP, _LARGE)
        library.mallopt(_TRIM, _LARGE)


def give_back() -> None:
    """Return whole free pages of the heap to the system now, wherever they lie."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
