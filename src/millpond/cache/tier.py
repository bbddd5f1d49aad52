"""The low-bit tier: tokens that would be forgotten are packed instead (MiKV, Yang et al., 2024), and forgotten later.

A layer keeps two kinds of tokens: prompt, latest frames and the important ones as they are, and behind them packed ones in
groups that were written together. A group is written once and lives or dies as a whole, so nothing is quantized twice and
nothing drifts from pass to pass. Attention reads packed and full tokens side by side on one desk that all layers share.
Knows the policy's contract; nothing about frames, questions or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond.cache.kv_quantizer import KVQuantizer
from millpond.cache.layer import PondLayer
from millpond.cache.quantized_store import QuantizedStore
from millpond.cache.storage import zeros
from millpond.errors import PolicyError
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.policies.base import View
from millpond.policies.scoring.matching import order_keys
from millpond.positions import Rope

if TYPE_CHECKING:
    from millpond.memory.plan import Plan

__all__ = ["DequantizationBuffer", "MixedPrecisionLayer", "Tier", "stream_order", "surviving_groups"]


@dataclass(frozen=True)
class Tier:
    """How much of a memory is packed, and how.

    Attributes:
        codec: the packing.
        full_share: of the remembered tokens, how many stay as they are.

    Raises:
        PolicyError: a share that is not between 0 and 1.
    """

    quantizer: KVQuantizer
    full_share: float

    def __post_init__(self) -> None:
        if not 0 < self.full_share < 1:
            raise PolicyError(f"full_share must lie between 0 and 1, not {self.full_share}")

    def quantized_tokens(self, memory: int) -> int:
        """Tokens to pack beside `memory` tokens in full: whole groups, and at least one."""
        group = self.quantizer.group
        return max(group, int(memory * (1 / self.full_share - 1)) // group * group)

    def quantized_bytes(self, geometry: Geometry, tokens: int) -> int:
        """Storage of `tokens` packed tokens over all layers, metadata included."""
        beside = geometry.bytes_per_token - geometry.kv_bytes_per_token
        groups = tokens // self.quantizer.group
        return (
            geometry.layers * geometry.kv_heads * groups * self.quantizer.group_bytes(geometry.head_dim)
            + tokens * beside
        )

    def dequantization_bytes(self, geometry: Geometry, tokens: int) -> int:
        """One layer's keys and values of `tokens` tokens in the model's dtype."""
        return geometry.kv_heads * 2 * tokens * geometry.vector_bytes

    def step(self, chunk: int) -> int:
        """Tokens coded at a time: whole groups, `chunk` tokens or one group."""
        return max(1, chunk // self.quantizer.group) * self.quantizer.group

    def quantization_bytes(self, geometry: Geometry, chunk: int) -> int:
        """What packing and reading take at a time."""
        step = self.step(chunk)
        return self.quantizer.scratch_bytes(step, geometry.head_dim) + step * (2 * 4 + 8) * geometry.head_dim

    def choosing_bytes(self, geometry: Geometry, full: int, quantized: int) -> int:
        """What choosing among the packed tokens takes beside the policy; `full` and `quantized` tokens of a layer."""
        # [H, n]: order, time, place, sums, protection, and which full ones stay or leave.
        return geometry.kv_heads * (
            (full + quantized) * (8 + 8 + 4 + 1 + 4 * geometry.accumulated_attention) + 8 * full
        )

    def sorting_bytes(self, tokens: int) -> int:
        """What putting one head's tokens in order takes, before the policy sees them."""
        return 48 * tokens

    def rerotation_bytes(self, geometry: Geometry, tokens: int) -> int:
        """What turning `tokens` of a layer to new positions takes: one head's order, positions and shifts."""
        return (40 + 20 * geometry.axes) * tokens


class DequantizationBuffer:
    """Where one layer's tokens of both kinds lie side by side in the model's dtype: keys, values [1, H, n, D], shared.

    What a layer laid out is gone when the next one is.
    """

    def __init__(self, geometry: Geometry, plan: Plan, tier: Tier, device: torch.device, ledger: Ledger) -> None:
        self.geometry, self.tier, self.device, self.ledger = geometry, tier, device, ledger
        self.allocate(plan)

    def allocate(self, plan: Plan) -> None:
        """Make it as large as a plan says."""
        self.step = self.tier.step(plan.chunk)
        self.quantization_bytes = self.tier.quantizer.scratch_bytes(self.step, self.geometry.head_dim)
        self.ledger.hold("dequantization_buffer", plan.dequantization_bytes)
        shape = 1, self.geometry.kv_heads, plan.quantized_tokens + plan.slots, self.geometry.head_dim
        self.keys = zeros(shape, self.geometry.dtype, self.device)
        self.values = zeros(shape, self.geometry.dtype, self.device)

    def clear(self) -> None:
        """Give the storage back."""
        self.keys = self.values = self.keys.new_empty(0)
        self.ledger.hold("dequantization_buffer", 0)

    def lay_out(self, quantized_store: QuantizedStore, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Unpack a quantized store and put a layer's full keys and values [1, H, n, D] behind it; returns views of both."""
        quantized = quantized_store.tokens
        end = quantized + keys.shape[2]
        with self.ledger.borrow("scratch", self.quantization_bytes):
            for head in range(keys.shape[1]):
                quantized_store.read(
                    head, 0, quantized, self.keys[0, head, :quantized], self.values[0, head, :quantized], self.step
                )
        self.keys[:, :, quantized:end].copy_(keys)
        self.values[:, :, quantized:end].copy_(values)
        return self.keys[:, :, :end], self.values[:, :, :end]


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

    def adopt(self, other: PondLayer) -> None:
        super().adopt(other)
        if isinstance(other, MixedPrecisionLayer):
            self.quantized_store.adopt(other.quantized_store)


def stream_order(time: Tensor, grid_position: Tensor) -> Tensor:
    """The order in which tokens stood in the stream, int64 [n].

    Args:
        time: int32 [n], first rotary position, which grows along the stream and is shared only within a frame.
        place: int16 [n, 2], which orders a frame by rows.
    """
    return order_keys(time.to(torch.int64, copy=True), grid_position).argsort(stable=True)


def surviving_groups(
    layer: MixedPrecisionLayer, view: View, start: int, groups: int, choose: Callable[[View, int], Tensor]
) -> Tensor:
    """Which packed groups stay, int64 [H, groups] ascending: those with the most tokens that the policy would keep.

    Args:
        view: of the layer's full tokens, whose protected ones the policy is shown beside the packed ones. start: their first slot.
        groups: how many stay, fewer than there are.
        choose: the policy's `keep`.
    """
    quantized, size = layer.quantized_store.tokens, layer.quantized_store.quantizer.group
    if not groups:
        return torch.empty(view.heads, 0, dtype=torch.int64, device=view.keys.device)
    shown, order = _packed_view(layer, view, start)
    keep = choose(shown, groups * size + shown.tokens - quantized)
    del shown
    # Of equals the group that was written later stays.
    live = layer.quantized_store.groups
    later = torch.arange(live, device=view.keys.device)
    votes = torch.empty(view.heads, live, dtype=torch.int64, device=view.keys.device)
    for head, kept in enumerate(keep):
        chosen = order[head, kept]
        votes[head] = (
            torch.bincount(chosen[chosen < quantized].div_(size, rounding_mode="floor"), minlength=live).mul_(live)
            + later
        )
    return votes.topk(groups, dim=1).indices.sort(dim=1).values


def _packed_view(layer: MixedPrecisionLayer, view: View, start: int) -> tuple[View, Tensor]:
    """The packed tokens and the protected full ones on the dequantization buffer in stream order, and where each is stored, int64 [H, n].

    A stored index below the number of packed tokens is one of theirs.
    """
    quantized_store, dequantization_buffer = layer.quantized_store, layer.dequantization_buffer
    quantized, heads, device = quantized_store.tokens, view.heads, view.keys.device
    count = quantized + int(view.protected[0].sum())
    order = torch.empty(heads, count, dtype=torch.int64, device=device)
    time_us = torch.empty_like(order)
    grid_position = torch.empty(heads, count, 2, dtype=torch.int16, device=device)
    accumulated_attention = None if view.accumulated_attention is None else torch.empty(heads, count, device=device)
    keys, values = dequantization_buffer.keys[0, :, :count], dequantization_buffer.values[0, :, :count]
    head_dim, dtype = keys.shape[2], keys.dtype
    for head in range(heads):
        full = view.protected[head].nonzero()[:, 0]
        where = torch.cat([quantized_store.live("grid_position")[head], view.grid_position[head].index_select(0, full)])
        first = layer.positions[head, start : start + view.tokens, 0].index_select(0, full)
        along = stream_order(torch.cat([quantized_store.live("positions")[head, :, 0], first]), where)
        order[head], grid_position[head] = along, where[along]
        time_us[head] = torch.cat([quantized_store.live("time_us")[head], view.time_us[head].index_select(0, full)])[
            along
        ]
        if accumulated_attention is not None and view.accumulated_attention is not None:
            accumulated_attention[head] = torch.cat(
                [
                    quantized_store.live("accumulated_attention")[head],
                    view.accumulated_attention[head].index_select(0, full),
                ]
            )[along]
        rank = torch.empty_like(along).index_copy_(0, along, torch.arange(count, device=device))
        for at in range(0, quantized, dequantization_buffer.step):
            end = min(at + dequantization_buffer.step, quantized)
            rows = torch.empty(end - at, head_dim, dtype=dtype, device=device)
            quantized_store.read(head, at, end, rows, None)
            keys[head].index_copy_(0, rank[at:end], rows)
            quantized_store.read(head, at, end, None, rows)
            values[head].index_copy_(0, rank[at:end], rows)
        for at in range(0, len(full), dequantization_buffer.step):
            part, to = (
                full[at : at + dequantization_buffer.step],
                rank[quantized + at : quantized + at + dequantization_buffer.step],
            )
            keys[head].index_copy_(0, to, view.keys[head].index_select(0, part))
            values[head].index_copy_(0, to, view.values[head].index_select(0, part))
    # The deeper layer's scores are those of its full tokens.
    shown = replace(
        view,
        keys=keys,
        values=values,
        time_us=time_us,
        grid_position=grid_position,
        protected=order >= quantized,
        accumulated_attention=accumulated_attention,
        deeper_scores=None,
        carried_scores=None,
        positions=None,
    )
    return shown, order
