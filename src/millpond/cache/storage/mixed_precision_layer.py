"""One decoder layer whose less important tokens are quantized: full ones as in any layer, quantized ones in groups beside them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millpond.cache.storage.exchange import Slab
from millpond.cache.storage.layer import LayerState, PondLayer
from millpond.cache.storage.quantized_store import DequantizationBuffer, QuantizedStore
from millpond.memory.geometry import Geometry
from millpond.memory.resumable import Step
from millpond.policies.scoring.matching import order_keys
from millpond.positions import Rope


class MixedPrecisionLayer(PondLayer):
    """A layer whose older, less important tokens are quantized.

    `length`, `keys` and the rest of `PondLayer` are the full tokens; transformers sees the quantized ones in front of them.
    Softmax does not care for the order of what lies in the past, so the quantized tokens need none.

    Args:
        geometry, capacity, device: as in `PondLayer`.
        groups: quantized groups to allocate. buffer: shared by all layers.
    """

    def __init__(
        self, geometry: Geometry, capacity: int, groups: int, buffer: DequantizationBuffer, device: torch.device
    ) -> None:
        super().__init__(geometry, capacity, device)
        self.buffer = buffer
        self.store = QuantizedStore(geometry, buffer.tier.quantizer, groups, device)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in self.store.tensors())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return self.buffer.dequantize(self.store, keys, values) if self.store.groups else (keys, values)

    def get_seq_length(self) -> int:
        return self.store.tokens + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.tokens + self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.store.capacity * self.store.quantizer.group + self.capacity

    def reset(self) -> None:
        super().reset()
        self.store.groups = 0

    def attended(self) -> tuple[Tensor, Tensor]:
        if not self.store.groups:
            return super().attended()
        keys = self.buffer.keys[0, :, : self.get_seq_length()]
        return keys, self._beside("accumulated_attention", self.accumulated(self.length)[0])

    def write_back(self, attention: Tensor) -> None:
        if self.store.groups:
            full, quantized = self.accumulated(self.length)
            quantized.copy_(attention[:, : self.store.tokens].view_as(quantized))
            full.copy_(attention[:, self.store.tokens :])

    def in_order(self, head: int) -> tuple[Tensor, Tensor]:
        if not self.store.groups:
            return super().in_order(head)
        order, positions, grid_position = self._order(head)
        return positions[order], grid_position[order]

    def rerotation(self, head: int, rope: Rope, by: Tensor, chunk: int) -> list[Step]:
        if not self.store.groups:
            return super().rerotation(head, rope, by, chunk)
        order, *_ = self._order(head)
        stored = torch.empty_like(by).index_copy_(0, order, by)
        del order
        count, step = self.store.tokens, self.buffer.tier.step(chunk)
        quantized = self.store.rerotation(head, rope, stored[:count], step)
        return [quantized, *super().rerotation(head, rope, stored[count:], chunk)]

    def _order(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """The stream order of all tokens of a head, int64 [n], and their positions and grid positions as stored."""
        positions = torch.cat([self.store.live("positions")[head], self.positions[head, : self.length]])
        on_grid = torch.cat([self.store.live("grid_position")[head], self.grid_position[head, : self.length]])
        return stream_order(positions[:, 0], on_grid), positions, on_grid

    def quantization_steps(self, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Step]:
        """The steps that quantize what `keep` leaves out, and move the rest down. See `Steps`.

        Args:
            keep, start, chunk: as in `compaction`. stay: int64 [H, g], quantized groups that stay; None for all.
        """
        drop = [] if stay is None else self.store.dropping(stay)
        leave = torch.empty(keep.shape[0], self.length - start - keep.shape[1], dtype=torch.int64, device=self.device)
        for head, kept in enumerate(keep):
            left = torch.ones(self.length - start, dtype=torch.bool, device=self.device)
            left[kept] = False
            leave[head] = left.nonzero()[:, 0].add_(start)
        first = self.store.groups if stay is None else stay.shape[1]
        put = partial(self.store.put, self, leave, first, self.buffer.tier.step(chunk))
        return [*drop, put, *self.compaction(keep, start, chunk)]

    def kept(self, start: int) -> tuple[Tensor, Tensor]:
        time_us, grid_position = super().kept(start)
        return self._beside("time_us", time_us), self._beside("grid_position", grid_position)

    def _beside(self, name: str, full: Tensor) -> Tensor:
        """One kind of metadata of the quantized tokens, and behind it that of full ones: [H, n, ...]."""
        return torch.cat([self.store.live(name), full], dim=1)

    def accumulated(self, length: int) -> list[Tensor]:
        assert self.store.accumulated_attention is not None
        return [*super().accumulated(length), self.store.accumulated_attention[:, : self.store.groups]]

    def resized(self, slots: int, length: int, groups: int) -> list[Slab]:
        return [*super().resized(slots, length, groups), *self.store.resized(groups)]

    def state(self) -> LayerState:
        return replace(super().state(), groups=self.store.groups, quantized=self.store.state())

    def restore(self, state: LayerState) -> None:
        super().restore(state)
        self.store.restore(state.groups, state.quantized)


def stream_order(time: Tensor, grid_position: Tensor) -> Tensor:
    """The order in which tokens stood in the stream, int64 [n].

    Args:
        time: int [n], first rotary position, which grows along the stream and is shared only within a frame.
        grid_position: int16 [n, 2], which orders a frame by rows.
    """
    return order_keys(time.to(torch.int64, copy=True), grid_position).argsort(stable=True)
