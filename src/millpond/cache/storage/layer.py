"""One decoder layer's keys, values and token metadata in storage that is allocated once.

Appending copies in place, compaction moves the survivors down in place, a rollback is an integer. Knows nothing about budgets or
policies; `millpond.cache.pond` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from millpond import ops
from millpond.cache.storage.exchange import Slab, attribute, zeros
from millpond.errors import BudgetError, ModelError
from millpond.memory.geometry import Geometry
from millpond.memory.resumable import InPlace, Pieces, Step
from millpond.ops.metadata import LayerMetadata
from millpond.positions import Rope

VECTORS = ("keys", "values")
METADATA = ("time_us", "grid_position", "positions", "accumulated_attention")
"""Attributes of a layer that hold its tensors; `accumulated_attention` may be None."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """The live tokens of one layer. The tensors are views of the storage that gave them.

    Attributes:
        length: tokens that are stored as they came. tensors: [H, length, ...] by the layer's names for them.
        groups: quantized groups. quantized: [H, groups, ...] by name.
    """

    length: int
    tensors: Mapping[str, Tensor]
    groups: int = 0
    quantized: Mapping[str, Tensor] = field(default_factory=dict)


class PondLayer(CacheLayerMixin):
    """A preallocated cache layer for batch 1.

    Args:
        geometry: shapes and dtype. capacity: token slots to allocate. device: where the storage lives.

    Attributes:
        keys, values: [1, H, capacity, D], storage; the first `length` slots are live.
        time_us: int64 [H, capacity], stream time of each token in microseconds.
        grid_position: int16 [H, capacity, 2], row and column on the frame's grid (see `millpond.policies.base`).
        positions: int32 [H, capacity, axes], rotary position of each stored key.
        accumulated_attention: float32 [H, capacity]; None unless the geometry has it. length: live slots.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, geometry: Geometry, capacity: int, device: torch.device) -> None:
        super().__init__()
        self.geometry = geometry
        self.device = device
        self.dtype = geometry.dtype
        self.length = 0
        self._allocate(capacity)
        self.is_initialized = True

    def _allocate(self, capacity: int) -> None:
        heads, head_dim = self.geometry.kv_heads, self.geometry.head_dim
        self.keys: Tensor = zeros((1, heads, capacity, head_dim), self.dtype, self.device)
        self.values: Tensor = zeros((1, heads, capacity, head_dim), self.dtype, self.device)
        self.time_us = zeros((heads, capacity), torch.int64, self.device)
        self.grid_position = zeros((heads, capacity, 2), torch.int16, self.device)
        self.positions = zeros((heads, capacity, self.geometry.axes), torch.int32, self.device)
        summed = self.geometry.accumulated_attention
        self.accumulated_attention = zeros((heads, capacity), torch.float32, self.device) if summed else None

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that there are."""
        return tuple(name for name in (*VECTORS, *METADATA) if getattr(self, name) is not None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the layer as [H, capacity, ...] views of its storage, in the order of `names`."""
        every = self.keys.select(0, 0), self.values.select(0, 0), self.time_us, self.grid_position, self.positions
        return every if self.accumulated_attention is None else (*every, self.accumulated_attention)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, not the bytes of live tokens."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage exists from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Copy the new keys and values [1, H, n, D] in place behind the live ones; return views of all live slots.

        Raises:
            BudgetError: no slots are free (the caller did not `ensure_capacity` the block first).
            ModelError: a batch above 1, or states of another dtype or shape than the cache was made for.
        """
        if key_states.shape[0] != 1:
            raise ModelError(f"a pond cache holds one stream (batch 1), not a batch of {key_states.shape[0]}")
        heads, head_dim = self.geometry.kv_heads, self.geometry.head_dim
        if key_states.shape[1] != heads or key_states.shape[3] != head_dim or key_states.dtype != self.dtype:
            got = f"{key_states.shape[1]} x {key_states.shape[3]} {key_states.dtype}"
            made = f"{heads} KV heads x {head_dim} {self.dtype}"
            raise ModelError(f"the cache was made for {made}, the model gives {got}")
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            raise BudgetError(
                f"a block of {end - start} tokens does not fit into the {self.capacity - start} free slots of the cache: "
                "feed smaller blocks (for generate: prefill_chunk_size) or raise the budget"
            )
        self.keys.narrow(2, start, end - start).copy_(key_states)
        self.values.narrow(2, start, end - start).copy_(value_states)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ModelError("a pond cache holds one stream: beam search is not possible")

    def metadata(self) -> LayerMetadata:
        """What `millpond.ops.write_metadata` writes into, behind the live slots."""
        return self.length, self.time_us, self.grid_position, self.positions, self.accumulated_attention

    def compaction(self, keep: Tensor, start: int, chunk: int) -> list[Step]:
        """The steps that move the kept tokens down in place, head by head; the rest is forgotten. See `Steps`.

        Args:
            keep: int64 [H, S], ascending, relative to `start`; everything below `start` stays where it is.
            chunk: survivors moved at a time.
        """
        live = [tensor.narrow(1, start, self.length - start) for tensor in self.tensors()]
        return [InPlace(ops.move_rows, keep, live, chunk).run, partial(self.set_length, start + keep.shape[1])]

    def set_length(self, length: int) -> None:
        """From now on so many slots are live."""
        self.length = length

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys [H, n, D] that the forward just run could see, and their `accumulated_attention` [H, n], to be changed and given to `write_back`."""
        return self.keys[0, :, : self.length], self.accumulated(self.length)[0]

    def write_back(self, attention: Tensor) -> None:
        """Write back what `attended` gave: nothing to do, it was the storage itself."""

    def in_order(self, head: int) -> tuple[Tensor, Tensor]:
        """int32 [n, axes] positions and int16 [n, 2] grid positions of a head's live tokens in the order of the stream."""
        return self.positions[head, : self.length], self.grid_position[head, : self.length]

    def rerotation(self, head: int, rope: Rope, by: Tensor, chunk: int) -> list[Step]:
        """The steps that rerotate one head's live keys by `by`, int64 [n, axes] in the order of `in_order`, and write the new positions down."""
        positions = self.positions[head, : self.length]
        moved = Pieces()

        def make(index: int) -> tuple[Tensor]:
            part = slice(index * chunk, (index + 1) * chunk)
            return (positions[part] + by[part].to(torch.int32),)

        def write(index: int, rows: Tensor) -> None:
            positions[index * chunk : index * chunk + len(rows)] = rows

        keys = rerotation(self.keys[0, head, : self.length], rope, by, chunk)
        return [keys, partial(moved.run, -(-len(positions) // chunk), make, write)]

    def kept(self, start: int) -> tuple[Tensor, Tensor]:
        """Stream times int64 [H, n] and grid positions int16 [H, n, 2] of all live tokens from slot `start` on, quantized ones in front."""
        return self.time_us[:, start : self.length], self.grid_position[:, start : self.length]

    def accumulated(self, length: int) -> list[Tensor]:
        """Views of the attention summed up by the tokens in front of slot `length`, and by the quantized ones."""
        assert self.accumulated_attention is not None
        return [self.accumulated_attention[:, :length]]

    def resized(self, slots: int, length: int, groups: int) -> list[Slab]:
        """Every tensor, as it becomes `slots` slots and `groups` quantized groups large, with at most `length` live slots by then."""
        return [attribute(self, name, slots, min(length, self.length), name in VECTORS) for name in self.names]

    def state(self) -> LayerState:
        """What is live."""
        live = (tensor[:, : self.length] for tensor in self.tensors())
        return LayerState(self.length, dict(zip(self.names, live, strict=True)))

    def restore(self, state: LayerState) -> None:
        """Copy what the `state` of a layer of the same geometry says into this one's storage."""
        for mine, theirs in zip(self.tensors(), state.tensors.values(), strict=True):
            mine[:, : state.length].copy_(theirs)
        self.length = state.length


def rerotation(keys: Tensor, rope: Rope, by: Tensor, chunk: int) -> Step:
    """A step that rerotates keys [n, D] in place by `by`, int64 [n, axes]; what is done is not done again when it is repeated."""
    return InPlace(ops.rerotate, keys, by, rope.axis, rope.inv_freq, chunk).run
