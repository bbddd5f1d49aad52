"""One decoder layer whose less important tokens are packed: full ones as in any layer, packed ones in groups behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from millpond.cache.storage.dequantization import DequantizationBuffer
from millpond.cache.storage.exchange import Slab
from millpond.cache.storage.layer import PondLayer
from millpond.cache.storage.quantized_store import QuantizedStore
from millpond.cache.storage.state import LayerState
from millpond.memory.geometry import Geometry
from millpond.policies.scoring.matching import order_keys
from millpond.positions import Rope

__all__ = ["MixedPrecisionLayer", "stream_order"]


class MixedPrecisionLayer(PondLayer):
    """A layer whose older, less important tokens are packed.

    `length`, `keys` and the rest of `PondLayer` are the full tokens; transformers sees the packed ones in front of them.
    Softmax does not care for the order of what lies in the past, so the packed tokens need none.

    Args:
        geometry, capacity, device: as in `PondLayer`.
        groups: packed groups to allocate. desk: shared by all layers.
    """

    def __init__(
        self,
        geometry: Geometry,
        capacity: int,
        groups: int,
        dequantization_buffer: DequantizationBuffer,
        device: torch.device,
    ) -> None:
        super().__init__(geometry, capacity, device)
        self.dequantization_buffer = dequantization_buffer
        self.quantized_store = QuantizedStore(geometry, dequantization_buffer.tier.quantizer, groups, device)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in self.quantized_store.tensors())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return (
            self.dequantization_buffer.lay_out(self.quantized_store, keys, values)
            if self.quantized_store.groups
            else (keys, values)
        )

    def get_seq_length(self) -> int:
        return self.quantized_store.tokens + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.quantized_store.tokens + self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.quantized_store.capacity * self.quantized_store.quantizer.group + self.capacity

    def reset(self) -> None:
        super().reset()
        self.quantized_store.groups = 0

    def attended(self) -> tuple[Tensor, Tensor]:
        if not self.quantized_store.groups:
            return super().attended()
        assert self.accumulated_attention is not None
        accumulated_attention = torch.cat(
            [self.quantized_store.live("accumulated_attention"), self.accumulated_attention[:, : self.length]], dim=1
        )
        return self.dequantization_buffer.keys[0, :, : self.get_seq_length()], accumulated_attention

    def credit(self, accumulated_attention: Tensor) -> None:
        quantized = self.quantized_store.tokens
        if quantized:
            assert self.quantized_store.accumulated_attention is not None
            assert self.accumulated_attention is not None
            self.quantized_store.accumulated_attention[:, : self.quantized_store.groups].copy_(
                accumulated_attention[:, :quantized].unflatten(1, (-1, self.quantized_store.quantizer.group))
            )
            self.accumulated_attention[:, : self.length].copy_(accumulated_attention[:, quantized:])

    def in_order(self, head: int) -> tuple[Tensor, Tensor]:
        if not self.quantized_store.groups:
            return super().in_order(head)
        order, positions, grid_position = self._order(head)
        return positions[order], grid_position[order]

    def turning(self, head: int, rope: Rope, by: Tensor, chunk: int) -> list[Callable[[], None]]:
        if not self.quantized_store.groups:
            return super().turning(head, rope, by, chunk)
        order, *_ = self._order(head)
        stored = torch.empty_like(by).index_copy_(0, order, by)
        del order
        quantized = self.quantized_store.tokens
        shelved = self.quantized_store.turning(
            head, rope, stored[:quantized], self.dequantization_buffer.tier.step(chunk)
        )
        return [shelved, *super().turning(head, rope, stored[quantized:], chunk)]

    def _order(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """The stream order of all tokens of a head, int64 [n], and their positions and places as stored."""
        positions = torch.cat([self.quantized_store.live("positions")[head], self.positions[head, : self.length]])
        grid_position = torch.cat(
            [self.quantized_store.live("grid_position")[head], self.grid_position[head, : self.length]]
        )
        return stream_order(positions[:, 0], grid_position), positions, grid_position

    def quantization_steps(self, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Callable[[], None]]:
        """The steps that pack what `keep` leaves out, and move the rest down. See `Steps`.

        Args:
            keep, start, chunk: as in `compaction`. stay: int64 [H, g], packed groups that stay; None for all.
        """
        drop = [] if stay is None else self.quantized_store.dropping(stay)
        leave = torch.empty(keep.shape[0], self.length - start - keep.shape[1], dtype=torch.int64, device=self.device)
        for head, kept in enumerate(keep):
            left = torch.ones(self.length - start, dtype=torch.bool, device=self.device)
            left[kept] = False
            leave[head] = left.nonzero()[:, 0].add_(start)
        first = self.quantized_store.groups if stay is None else stay.shape[1]
        put = partial(self.quantized_store.put, self, leave, first, self.dequantization_buffer.tier.step(chunk))
        return [*drop, put, *self.compaction(keep, start, chunk)]

    def kept(self, start: int) -> tuple[Tensor, Tensor]:
        shelved = self.quantized_store.live("time_us"), self.quantized_store.live("grid_position")
        time_us, grid_position = (torch.cat(both, dim=1) for both in zip(shelved, super().kept(start), strict=True))
        return time_us, grid_position

    def accumulated(self, length: int) -> list[Tensor]:
        quantized = (
            []
            if self.quantized_store.accumulated_attention is None
            else [self.quantized_store.accumulated_attention[:, : self.quantized_store.groups]]
        )
        return [*super().accumulated(length), *quantized]

    def resized(self, slots: int, length: int, groups: int) -> list[Slab]:
        return [*super().resized(slots, length, groups), *self.quantized_store.resized(groups)]

    def state(self) -> LayerState:
        return replace(super().state(), groups=self.quantized_store.groups, quantized=self.quantized_store.state())

    def restore(self, state: LayerState) -> None:
        super().restore(state)
        self.quantized_store.restore(state.groups, state.quantized)


def stream_order(time: Tensor, grid_position: Tensor) -> Tensor:
    """The order in which tokens stood in the stream, int64 [n].

    Args:
        time: int [n], first rotary position, which grows along the stream and is shared only within a frame.
        place: int16 [n, 2], which orders a frame by rows.
    """
    return order_keys(time.to(torch.int64, copy=True), grid_position).argsort(stable=True)
