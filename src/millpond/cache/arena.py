"""Storage for layers of different length: one allocation a kind for the whole pond, cut into regions that can move.

Knows rows, not tokens' meaning: who may hold how many is decided by `millpond.cache.pond`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from millpond.cache.layer import PondLayer

__all__ = ["Arena"]

_VECTORS = ("keys", "values")
_METADATA = ("time_us", "place", "positions", "sums")


class Arena:
    """The tensors of all layers, end to end.

    A region is a layer's [H, capacity, ...] block; regions lie in the order of the layers. Live rows are the first `length` of
    each head. Cutting anew moves live rows within the allocation, a chunk at a time.

    Args:
        layers: their tensors become views of the arena.
        capacities: slots of each layer; the sum is the arena's size.

    Attributes:
        vectors, metadata: kinds of storage that there are, the large and the small.
    """

    def __init__(self, layers: Sequence[PondLayer], capacities: Sequence[int]) -> None:
        self._layers = layers
        self._heads = layers[0].geometry.kv_heads
        self.vectors = _VECTORS
        self.metadata = tuple(kind for kind in _METADATA if getattr(layers[0], kind) is not None)
        self._flat: dict[str, Tensor] = {}
        for kind in (*self.vectors, *self.metadata):
            like = getattr(layers[0], kind)
            shape = like.shape[3:] if kind in _VECTORS else like.shape[2:]
            self._flat[kind] = torch.zeros(
                sum(capacities) * self._heads, *shape, dtype=like.dtype, device=layers[0].device
            )
        self._bind(capacities)

    @property
    def slots(self) -> int:
        """Slots over all layers."""
        return len(self._flat["time_us"]) // self._heads

    @property
    def capacities(self) -> list[int]:
        """Slots of each layer."""
        return [layer.capacity for layer in self._layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(flat.untyped_storage().nbytes() for flat in self._flat.values())

    def cut(self, capacities: Sequence[int], chunk: int) -> None:
        """Give the layers regions of other sizes; every live row keeps its bytes and its slot.

        Args:
            capacities: at least each layer's length; the sum is at most the arena's size.
            chunk: rows moved at a time, which is all the scratch.
        """
        assert sum(capacities) <= self.slots
        self._move(self._starts(self.capacities), self._starts(capacities), chunk)
        self._bind(capacities)

    def pack(self, chunk: int) -> int:
        """Move all live rows to the front, and return how many they are; the layers are without storage until `unpack`."""
        lengths = [layer.length for layer in self._layers]
        self._move(self._starts(self.capacities), self._starts(lengths), chunk)
        for layer in self._layers:
            for kind, flat in self._flat.items():
                setattr(layer, kind, flat.new_empty(0))
        return self._heads * sum(lengths)

    def unpack(self, capacities: Sequence[int], chunk: int) -> None:
        """The reverse: regions of these sizes."""
        self._move(self._starts([layer.length for layer in self._layers]), self._starts(capacities), chunk)
        self._bind(capacities)

    def empty(self, kind: str, slots: int) -> Tensor:
        """Zeroed storage for `slots` slots over all layers: [slots x H, ...]."""
        flat = self._flat[kind]
        return torch.zeros(slots * self._heads, *flat.shape[1:], dtype=flat.dtype, device=flat.device)

    def flat(self, kind: str) -> Tensor:
        """One kind's storage, [slots x H, ...]."""
        return self._flat[kind]

    def replace(self, kind: str, flat: Tensor) -> None:
        """Put other storage in place of a packed arena's; its rows are the caller's matter."""
        self._flat[kind] = flat

    def _move(self, old: Sequence[int], new: Sequence[int], chunk: int) -> None:
        """Move the live rows of every head of every layer from row `old` on to row `new` on."""
        counts = [layer.length for layer in self._layers for _ in range(self._heads)]
        moves = list(zip(old, new, counts, strict=True))
        # Segments keep their order, so those that move down go first, from the left, and those that move up from the right:
        # none is written over before it has moved.
        for flat in self._flat.values():
            for source, target, count in moves:
                if target < source:
                    for first in range(0, count, chunk):
                        _copy(flat, source + first, target + first, min(chunk, count - first))
            for source, target, count in reversed(moves):
                if target > source:
                    for last in range(count, 0, -chunk):
                        size = min(chunk, last)
                        _copy(flat, source + last - size, target + last - size, size)

    def _starts(self, capacities: Sequence[int]) -> list[int]:
        """First row of each head of each layer."""
        rows = [size for size in capacities for _ in range(self._heads)]
        return [0, *accumulate(rows)][:-1]

    def _bind(self, capacities: Sequence[int]) -> None:
        first = 0
        for layer, size in zip(self._layers, capacities, strict=True):
            rows = slice(first, first + self._heads * size)
            first = rows.stop
            for kind, flat in self._flat.items():
                region = flat[rows].view(self._heads, size, *flat.shape[1:])
                setattr(layer, kind, region[None] if kind in _VECTORS else region)


def _copy(flat: Tensor, source: int, target: int, count: int) -> None:
    flat[target : target + count] = flat[source : source + count].clone()
