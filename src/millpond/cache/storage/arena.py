"""Storage for layers of different length: one allocation per kind of tensor for the whole pond, cut into regions that can move."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Relocation, Step, Storage, StorageState
from millpond.cache.storage.exchange import Slab, zeros
from millpond.cache.storage.layer import VECTORS, PondLayer
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Pieces, Steps


class ArenaStorage(Storage):
    """`Plan.slots` slots on average over the layers, shared among them by what each was granted.

    Attributes:
        arena: in which they lie.
    """

    layer_budgets = True

    def __init__(self, geometry: Geometry, plan: Plan, device: torch.device, ledger: Ledger) -> None:
        layers = [PondLayer(geometry, 0, device) for _ in range(geometry.layers)]
        self.arena = Arena(layers, [plan.slots] * geometry.layers)
        super().__init__(geometry, layers, ledger)

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def finishing(self, lengths: Sequence[int], free: int, chunk: int) -> list[Step]:
        # Beside its memory every layer keeps the same headroom: blocks and turns are equally long in all of them.
        moves = self.arena.cutting([length + free for length in lengths], lengths, chunk)
        return [*moves, *super().finishing(lengths, free, chunk)]

    def resized(self, plan: Plan, length: int) -> list[Slab]:
        arena, layers = self.arena, self.layers
        live = min(arena.slots, sum(layer.length for layer in layers), length * len(layers))
        return [_slab(arena, kind, plan.slots * len(layers), live) for kind in arena.kinds]

    def relocation(self, old: Plan, new: Plan, exchanged: bool) -> Relocation:
        if not exchanged:
            return Relocation()
        lengths = [layer.length for layer in self.layers]
        headroom = (new.slots * len(lengths) - sum(lengths)) // len(lengths)
        forth = self.arena.scattering([length + headroom for length in lengths], old.chunk)
        back = self.arena.scattering(self.arena.capacities, old.chunk)
        # With the scratch of a plan that has it.
        return Relocation(
            before=[self._with_scratch(old, self.arena.gathering(old.chunk))],
            forth=[self._with_scratch(new, forth)],
            back=[self._with_scratch(old, back)],
        )

    def _with_scratch(self, plan: Plan, moves: Sequence[Step]) -> Step:
        steps = Steps(moves)

        def run() -> None:
            with self.ledger.borrow("scratch", plan.scratch_bytes):
                steps.run()

        return run

    def restore(self, state: StorageState) -> None:
        Steps(self.arena.cutting(state.capacities, [0] * len(self.layers), 1)).run()
        super().restore(state)


class Arena:
    """The tensors of all layers, end to end.

    A region is a layer's [H, capacity, ...] block; regions lie in the order of the layers. Live rows are the first `length` of
    each head. Cutting anew moves live rows within the allocation, a chunk at a time.

    Args:
        layers: their tensors become views of the arena.
        capacities: slots of each layer; the sum is the arena's size.

    Attributes:
        kinds: of storage that there are.
    """

    def __init__(self, layers: Sequence[PondLayer], capacities: Sequence[int]) -> None:
        self._layers = layers
        self._heads = layers[0].geometry.kv_heads
        self.kinds = layers[0].names
        self._flat: dict[str, Tensor] = {}
        for kind in self.kinds:
            like = getattr(layers[0], kind)
            shape = like.shape[3:] if kind in VECTORS else like.shape[2:]
            self._flat[kind] = zeros((sum(capacities) * self._heads, *shape), like.dtype, layers[0].device)
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

    def cutting(self, capacities: Sequence[int], lengths: Sequence[int], chunk: int) -> list[Step]:
        """The steps that give the layers regions of other sizes; every live row keeps its bytes and its slot. See `Steps`.

        Args:
            capacities: at least each layer's length; the sum is at most the arena's size.
            lengths: live rows that the layers will have when the steps begin.
            chunk: rows moved at a time, which is all the scratch.
        """
        assert sum(capacities) <= self.slots
        moves = self._moves(self._starts(self.capacities), self._starts(capacities), lengths, chunk)
        return [*moves, partial(self._bind, capacities)]

    def gathering(self, chunk: int) -> list[Step]:
        """The steps that move all live rows to the front; then the layers are without storage until `scattering` is done."""
        lengths = [layer.length for layer in self._layers]
        return [*self._moves(self._starts(self.capacities), self._starts(lengths), lengths, chunk), self._unbind]

    def scattering(self, capacities: Sequence[int], chunk: int) -> list[Step]:
        """The reverse: regions of these sizes."""
        lengths = [layer.length for layer in self._layers]
        moves = self._moves(self._starts(lengths), self._starts(capacities), lengths, chunk)
        return [*moves, partial(self._bind, capacities)]

    def flat(self, kind: str) -> Tensor:
        """One kind's storage, [slots x H, ...]."""
        return self._flat[kind]

    def replace(self, kind: str, flat: Tensor) -> None:
        """Put other storage in place of that of a gathered arena; its rows are the caller's matter."""
        self._flat[kind] = flat

    def _moves(self, old: Sequence[int], new: Sequence[int], lengths: Sequence[int], chunk: int) -> list[Step]:
        """Steps that move the live rows of every head of every layer from row `old` on to row `new` on, a step a kind."""
        counts = [length for length in lengths for _ in range(self._heads)]
        moves = list(zip(old, new, counts, strict=True))
        # Segments keep their order, so those that move down go first, from the left, and those that move up from the right:
        # none is written over before it has moved.
        pieces: list[tuple[int, int, int]] = []
        for source, target, count in moves:
            if target < source:
                for first in range(0, count, chunk):
                    pieces.append((source + first, target + first, min(chunk, count - first)))
        for source, target, count in reversed(moves):
            if target > source:
                for last in range(count, 0, -chunk):
                    size = min(chunk, last)
                    pieces.append((source + last - size, target + last - size, size))
        return [partial(self._move, kind, pieces, Pieces()) for kind in self.kinds]

    def _move(self, kind: str, pieces: Sequence[tuple[int, int, int]], progress: Pieces) -> None:
        flat = self._flat[kind]

        def make(index: int) -> tuple[Tensor]:
            source, _, count = pieces[index]
            return (flat[source : source + count].clone(),)

        def write(index: int, rows: Tensor) -> None:
            target = pieces[index][1]
            flat[target : target + len(rows)] = rows

        progress.run(len(pieces), make, write)

    def _starts(self, capacities: Sequence[int]) -> list[int]:
        """First row of each head of each layer."""
        rows = [size for size in capacities for _ in range(self._heads)]
        return [0, *accumulate(rows)][:-1]

    def _unbind(self) -> None:
        for layer in self._layers:
            for kind, flat in self._flat.items():
                setattr(layer, kind, flat.new_empty(0))

    def _bind(self, capacities: Sequence[int]) -> None:
        first = 0
        for layer, size in zip(self._layers, capacities, strict=True):
            rows = slice(first, first + self._heads * size)
            first = rows.stop
            for kind, flat in self._flat.items():
                region = flat[rows].view(self._heads, size, *flat.shape[1:])
                setattr(layer, kind, region[None] if kind in VECTORS else region)


def _slab(arena: Arena, kind: str, slots: int, live: int) -> Slab:
    """One kind of an arena's storage, which has its heads one behind the other: [1, n x H, ...]."""
    rows = len(arena.flat(kind))
    heads = rows // arena.slots

    def put(tensor: Tensor) -> None:
        arena.replace(kind, tensor[0])

    return Slab(lambda: arena.flat(kind)[None], put, rows, slots * heads, live * heads)
