"""The low-bit tier: tokens that would be forgotten are packed instead (MiKV, Yang et al., 2024), and forgotten later.

A layer keeps two kinds of tokens: prompt, latest frames and the important ones as they are, and behind them packed ones in
groups that were written together. A group is written once and lives or dies as a whole, so nothing is quantised twice and
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

from millpond.cache.codec import Codec
from millpond.cache.layer import PondLayer
from millpond.cache.ledger import Ledger
from millpond.cache.shelf import Shelf
from millpond.cache.storage import zeros
from millpond.errors import PolicyError
from millpond.geometry import Geometry
from millpond.policies.base import View
from millpond.positions import Rope

if TYPE_CHECKING:
    from millpond.plan import Plan

__all__ = ["Desk", "Tier", "TieredLayer", "stream_order", "surviving_groups"]


@dataclass(frozen=True)
class Tier:
    """How much of a memory is packed, and how.

    Attributes:
        codec: the packing.
        full_share: of the remembered tokens, how many stay as they are.

    Raises:
        PolicyError: a share that is not between 0 and 1.
    """

    codec: Codec
    full_share: float

    def __post_init__(self) -> None:
        if not 0 < self.full_share < 1:
            raise PolicyError(f"full_share must lie between 0 and 1, not {self.full_share}")

    def packed_tokens(self, memory: int) -> int:
        """Tokens to pack beside `memory` tokens in full: whole groups, and at least one."""
        group = self.codec.group
        return max(group, int(memory * (1 / self.full_share - 1)) // group * group)

    def packed_bytes(self, geometry: Geometry, tokens: int) -> int:
        """Storage of `tokens` packed tokens over all layers, metadata included."""
        beside = geometry.bytes_per_token - geometry.kv_bytes_per_token
        groups = tokens // self.codec.group
        return (
            geometry.layers * geometry.kv_heads * groups * self.codec.group_bytes(geometry.head_dim) + tokens * beside
        )

    def desk_bytes(self, geometry: Geometry, tokens: int) -> int:
        """One layer's keys and values of `tokens` tokens in the model's dtype."""
        return geometry.kv_heads * 2 * tokens * geometry.vector_bytes

    def step(self, chunk: int) -> int:
        """Tokens coded at a time: whole groups, `chunk` tokens or one group."""
        return max(1, chunk // self.codec.group) * self.codec.group

    def coding_bytes(self, geometry: Geometry, chunk: int) -> int:
        """What packing and reading take at a time."""
        step = self.step(chunk)
        return self.codec.scratch_bytes(step, geometry.head_dim) + step * (2 * 4 + 8) * geometry.head_dim

    def choosing_bytes(self, geometry: Geometry, full: int, packed: int) -> int:
        """What choosing among the packed tokens takes beside the policy; `full` and `packed` tokens of a layer."""
        # [H, n]: order, time, place, sums, protection, and which full ones stay or leave.
        return geometry.kv_heads * ((full + packed) * (8 + 8 + 4 + 1 + 4 * geometry.sums) + 8 * full)

    def sorting_bytes(self, tokens: int) -> int:
        """What putting one head's tokens in order takes, before the policy sees them."""
        return 48 * tokens

    def turning_bytes(self, geometry: Geometry, tokens: int) -> int:
        """What turning `tokens` of a layer to new positions takes: one head's order, positions and shifts."""
        return (40 + 20 * geometry.axes) * tokens


class Desk:
    """Where one layer's tokens of both kinds lie side by side in the model's dtype: keys, values [1, H, n, D], shared.

    What a layer laid out is gone when the next one is.
    """

    def __init__(self, geometry: Geometry, plan: Plan, tier: Tier, device: torch.device, ledger: Ledger) -> None:
        self.geometry, self.tier, self.device, self.ledger = geometry, tier, device, ledger
        self.allocate(plan)

    def allocate(self, plan: Plan) -> None:
        """Make it as large as a plan says."""
        self.step = self.tier.step(plan.chunk)
        self.coding_bytes = self.tier.codec.scratch_bytes(self.step, self.geometry.head_dim)
        self.ledger.hold("desk", plan.desk_bytes)
        shape = 1, self.geometry.kv_heads, plan.packed_tokens + plan.slots, self.geometry.head_dim
        self.keys = zeros(shape, self.geometry.dtype, self.device)
        self.values = zeros(shape, self.geometry.dtype, self.device)

    def clear(self) -> None:
        """Give the storage back."""
        self.keys = self.values = self.keys.new_empty(0)
        self.ledger.hold("desk", 0)

    def lay_out(self, shelf: Shelf, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Unpack a shelf and put a layer's full keys and values [1, H, n, D] behind it; returns views of both."""
        packed = shelf.tokens
        end = packed + keys.shape[2]
        with self.ledger.borrow("scratch", self.coding_bytes):
            for head in range(keys.shape[1]):
                shelf.read(head, 0, packed, self.keys[0, head, :packed], self.values[0, head, :packed], self.step)
        self.keys[:, :, packed:end].copy_(keys)
        self.values[:, :, packed:end].copy_(values)
        return self.keys[:, :, :end], self.values[:, :, :end]


class TieredLayer(PondLayer):
    """A layer whose older, less important tokens are packed.

    `length`, `keys` and the rest of `PondLayer` are the full tokens; transformers sees the packed ones in front of them.
    Softmax does not care for the order of what lies in the past, so the packed tokens need none.

    Args:
        geometry, capacity, device: as in `PondLayer`.
        groups: packed groups to allocate. desk: shared by all layers.
    """

    def __init__(self, geometry: Geometry, capacity: int, groups: int, desk: Desk, device: torch.device) -> None:
        super().__init__(geometry, capacity, device)
        self.desk = desk
        self.shelf = Shelf(geometry, desk.tier.codec, groups, device)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in self.shelf.tensors())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return self.desk.lay_out(self.shelf, keys, values) if self.shelf.groups else (keys, values)

    def get_seq_length(self) -> int:
        return self.shelf.tokens + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shelf.tokens + self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.shelf.capacity * self.shelf.codec.group + self.capacity

    def reset(self) -> None:
        super().reset()
        self.shelf.groups = 0

    def attended(self) -> tuple[Tensor, Tensor]:
        if not self.shelf.groups:
            return super().attended()
        assert self.sums is not None
        sums = torch.cat([self.shelf.live("sums"), self.sums[:, : self.length]], dim=1)
        return self.desk.keys[0, :, : self.get_seq_length()], sums

    def credit(self, sums: Tensor) -> None:
        packed = self.shelf.tokens
        if packed:
            assert self.shelf.sums is not None
            assert self.sums is not None
            self.shelf.sums[:, : self.shelf.groups].copy_(sums[:, :packed].unflatten(1, (-1, self.shelf.codec.group)))
            self.sums[:, : self.length].copy_(sums[:, packed:])

    def in_order(self, head: int) -> tuple[Tensor, Tensor]:
        if not self.shelf.groups:
            return super().in_order(head)
        order, positions, place = self._order(head)
        return positions[order], place[order]

    def turning(self, head: int, rope: Rope, by: Tensor, chunk: int) -> list[Callable[[], None]]:
        if not self.shelf.groups:
            return super().turning(head, rope, by, chunk)
        order, *_ = self._order(head)
        stored = torch.empty_like(by).index_copy_(0, order, by)
        del order
        packed = self.shelf.tokens
        shelved = self.shelf.turning(head, rope, stored[:packed], self.desk.tier.step(chunk))
        return [shelved, *super().turning(head, rope, stored[packed:], chunk)]

    def _order(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """The stream order of all tokens of a head, int64 [n], and their positions and places as stored."""
        positions = torch.cat([self.shelf.live("positions")[head], self.positions[head, : self.length]])
        place = torch.cat([self.shelf.live("place")[head], self.place[head, : self.length]])
        return stream_order(positions[:, 0], place), positions, place

    def demotion(self, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Callable[[], None]]:
        """The steps that pack what `keep` leaves out, and move the rest down. See `Steps`.

        Args:
            keep, start, chunk: as in `compaction`. stay: int64 [H, g], packed groups that stay; None for all.
        """
        drop = [] if stay is None else self.shelf.dropping(stay)
        leave = torch.empty(keep.shape[0], self.length - start - keep.shape[1], dtype=torch.int64, device=self.device)
        for head, kept in enumerate(keep):
            left = torch.ones(self.length - start, dtype=torch.bool, device=self.device)
            left[kept] = False
            leave[head] = left.nonzero()[:, 0].add_(start)
        first = self.shelf.groups if stay is None else stay.shape[1]
        put = partial(self.shelf.put, self, leave, first, self.desk.tier.step(chunk))
        return [*drop, put, *self.compaction(keep, start, chunk)]

    def adopt(self, other: PondLayer) -> None:
        super().adopt(other)
        if isinstance(other, TieredLayer):
            self.shelf.adopt(other.shelf)


def stream_order(time: Tensor, place: Tensor) -> Tensor:
    """The order in which tokens stood in the stream, int64 [n].

    Args:
        time: int [n], first rotary position, which grows along the stream and is shared only within a frame.
        place: int16 [n, 2], which orders a frame by rows.
    """
    key = time.to(torch.int64) << 32
    key.add_(place[:, 0].to(torch.int64).add_(2) << 16)
    key.add_(place[:, 1].to(torch.int64).add_(2))
    return key.argsort(stable=True)


def surviving_groups(
    layer: TieredLayer, view: View, start: int, groups: int, choose: Callable[[View, int], Tensor]
) -> Tensor:
    """Which packed groups stay, int64 [H, groups] ascending: those with the most tokens that the policy would keep.

    Args:
        view: of the layer's full tokens, whose protected ones the policy is shown beside the packed ones. start: their first slot.
        groups: how many stay, fewer than there are.
        choose: the policy's `keep`.
    """
    packed, size = layer.shelf.tokens, layer.shelf.codec.group
    if not groups:
        return torch.empty(view.heads, 0, dtype=torch.int64, device=view.keys.device)
    shown, order = _packed_view(layer, view, start)
    keep = choose(shown, groups * size + shown.tokens - packed)
    del shown
    # Of equals the group that was written later stays.
    live = layer.shelf.groups
    later = torch.arange(live, device=view.keys.device)
    votes = torch.empty(view.heads, live, dtype=torch.int64, device=view.keys.device)
    for head, kept in enumerate(keep):
        chosen = order[head, kept]
        votes[head] = (
            torch.bincount(chosen[chosen < packed].div_(size, rounding_mode="floor"), minlength=live).mul_(live) + later
        )
    return votes.topk(groups, dim=1).indices.sort(dim=1).values


def _packed_view(layer: TieredLayer, view: View, start: int) -> tuple[View, Tensor]:
    """The packed tokens and the protected full ones on the desk in stream order, and where each is stored, int64 [H, n].

    A stored index below the number of packed tokens is one of theirs.
    """
    shelf, desk = layer.shelf, layer.desk
    packed, heads, device = shelf.tokens, view.heads, view.keys.device
    count = packed + int(view.protected[0].sum())
    order = torch.empty(heads, count, dtype=torch.int64, device=device)
    time_us = torch.empty_like(order)
    place = torch.empty(heads, count, 2, dtype=torch.int16, device=device)
    sums = None if view.sums is None else torch.empty(heads, count, device=device)
    keys, values = desk.keys[0, :, :count], desk.values[0, :, :count]
    width, dtype = keys.shape[2], keys.dtype
    for head in range(heads):
        full = view.protected[head].nonzero()[:, 0]
        where = torch.cat([shelf.live("place")[head], view.place[head].index_select(0, full)])
        first = layer.positions[head, start : start + view.tokens, 0].index_select(0, full)
        along = stream_order(torch.cat([shelf.live("positions")[head, :, 0], first]), where)
        order[head], place[head] = along, where[along]
        time_us[head] = torch.cat([shelf.live("time_us")[head], view.time_us[head].index_select(0, full)])[along]
        if sums is not None and view.sums is not None:
            sums[head] = torch.cat([shelf.live("sums")[head], view.sums[head].index_select(0, full)])[along]
        rank = torch.empty_like(along).index_copy_(0, along, torch.arange(count, device=device))
        for at in range(0, packed, desk.step):
            end = min(at + desk.step, packed)
            rows = torch.empty(end - at, width, dtype=dtype, device=device)
            shelf.read(head, at, end, rows, None)
            keys[head].index_copy_(0, rank[at:end], rows)
            shelf.read(head, at, end, None, rows)
            values[head].index_copy_(0, rank[at:end], rows)
        for at in range(0, len(full), desk.step):
            part, to = full[at : at + desk.step], rank[packed + at : packed + at + desk.step]
            keys[head].index_copy_(0, to, view.keys[head].index_select(0, part))
            values[head].index_copy_(0, to, view.values[head].index_select(0, part))
    # The deeper layer's scores are those of its full tokens.
    shown = replace(
        view,
        keys=keys,
        values=values,
        time_us=time_us,
        place=place,
        protected=order >= packed,
        sums=sums,
        deeper=None,
        carry=None,
        positions=None,
    )
    return shown, order
