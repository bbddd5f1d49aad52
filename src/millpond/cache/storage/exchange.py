"""Tensors of a pond's storage that are replaced by larger or smaller ones, one at a time, without ever passing the cap.

A tensor is replaced by allocating its successor beside it where both fit under the cap. Where they do not, its live rows wait in the
unused tails of the other tensors while it is freed first. Knows bytes; not what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.ledger import Ledger


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed storage.

    Raises:
        BudgetError: the machine does not have it.
    """
    try:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    except (MemoryError, RuntimeError) as error:
        size = format_bytes(prod(shape) * dtype.itemsize)
        raise BudgetError(f"the {device.type} has no {size} more for the memory: give it a smaller budget") from error


@dataclass(frozen=True)
class Slab:
    """One tensor of the storage, [H, n, ...].

    Attributes:
        get, put: read and replace the tensor; putting one is a single step.
        old, new: n before and after. live: rows of each head in use.
    """

    get: Callable[[], Tensor]
    put: Callable[[Tensor], None]
    old: int
    new: int
    live: int

    def nbytes(self, rows: int) -> int:
        """Bytes of `rows` rows of every head."""
        like = self.get()
        return like.shape[0] * rows * prod(like.shape[2:]) * like.itemsize

    def allocate(self, rows: int) -> Tensor:
        """Zeroed, [H, rows, ...]."""
        like = self.get()
        return zeros((like.shape[0], rows, *like.shape[2:]), like.dtype, like.device)

    def spans(self, first: int, last: int) -> list[Tensor]:
        """Bytes of the rows from `first` to `last` of each head, uint8 views."""
        return [head[first:last].reshape(-1).view(torch.uint8) for head in self.get()]


def attribute(holder: Any, name: str, new: int, live: int, batched: bool = False) -> Slab:
    """A holder's tensor by its name, [H, n, ...], or [1, H, n, ...] when `batched`."""

    def get() -> Tensor:
        tensor: Tensor = getattr(holder, name)
        return tensor[0] if batched else tensor

    def put(tensor: Tensor) -> None:
        setattr(holder, name, tensor[None] if batched else tensor)

    return Slab(get, put, get().shape[1], new, live)


def feasible(slabs: Sequence[Slab], held: int, limit: int | None) -> bool:
    """Whether the slabs can be exchanged in this order, with `held` bytes of the cap taken at first; backwards too, then."""
    if limit is None:
        return True
    tails = sum(slab.nbytes(slab.old - slab.live) for slab in slabs)
    for slab in slabs:
        old, new = slab.nbytes(slab.old), slab.nbytes(slab.new)
        others = tails - slab.nbytes(slab.old - slab.live)
        if held + new > limit and (others < slab.nbytes(slab.live) or held - old + new > limit):
            return False
        held += new - old
        tails = others + slab.nbytes(slab.new - slab.live)
    return True


class Exchange:
    """Gives all slabs their new size, or their old one again; can be interrupted anywhere and run again.

    Args:
        slabs: in an order that is `feasible`. limit: the cap meanwhile. nbytes: bytes of the whole storage as it is now.
    """

    def __init__(self, slabs: Sequence[Slab], ledger: Ledger, limit: int | None, nbytes: Callable[[], int]) -> None:
        self._slabs, self._ledger, self._limit, self._nbytes = slabs, ledger, limit, nbytes
        self._parked: tuple[Slab, list[list[Tensor]]] | None = None  # whose live rows lie in which spans of the others

    def forth(self) -> None:
        """To the new sizes."""
        for slab in self._slabs:
            self._resize(slab, slab.new)

    def back(self) -> None:
        """To the old sizes."""
        for slab in reversed(self._slabs):
            self._resize(slab, slab.old)

    def _resize(self, slab: Slab, rows: int) -> None:
        if self._parked is None or self._parked[0] is not slab:
            self._ledger.hold("storage", self._nbytes())
            if slab.get().shape[1] == rows:
                return
            if self._limit is None or self._ledger.held + slab.nbytes(rows) <= self._limit:
                self._ledger.hold("storage", self._nbytes() + slab.nbytes(rows))
                new = slab.allocate(rows)
                new[:, : slab.live] = slab.get()[:, : slab.live]
                slab.put(new)
                self._ledger.hold("storage", self._nbytes())
                return
            self._parked = slab, self._park(slab)
        parked = self._parked[1]
        slab.put(slab.get()[:, :0].clone())
        self._ledger.hold("storage", self._nbytes() + slab.nbytes(rows))
        new = slab.allocate(rows)
        for head, spans in zip(new, parked, strict=True):
            into, first = head[: slab.live].reshape(-1).view(torch.uint8), 0
            for span in spans:
                into[first : first + len(span)] = span
                first += len(span)
        slab.put(new)
        self._parked = None

    def _park(self, slab: Slab) -> list[list[Tensor]]:
        """Copy a slab's live rows into the tails of the others; for each head the spans where they lie, in order."""
        others = [other for other in self._slabs if other is not slab]
        tails = chain.from_iterable(other.spans(other.live, other.get().shape[1]) for other in others)
        tail, parked = next(tails), []
        for rows in slab.spans(0, slab.live):
            spans, first = [], 0
            while first < len(rows):
                if not len(tail):
                    tail = next(tails)  # there is one more: `feasible` made sure
                    continue
                span = tail[: len(rows) - first]
                span.copy_(rows[first : first + len(span)])
                spans.append(span)
                first, tail = first + len(span), tail[len(span) :]
            parked.append(spans)
        return parked
