"""One layer's packed tokens, in storage that is allocated once. Knows nothing about what is worth packing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from millpond.cache.codec import Codec
from millpond.cache.layer import PondLayer
from millpond.geometry import Geometry
from millpond.positions import Rope
from millpond.resumable import Pieces, Rows

__all__ = ["Shelf"]


class Shelf:
    """One layer's packed tokens: `capacity` groups of storage for each head, allocated once.

    Attributes:
        key_codes, key_scales, value_codes, value_scales: as in `Codec`, [H, capacity, ...].
        time_us, place, positions, sums: as in `PondLayer`, [H, capacity, G, ...].
        groups: live groups, in the order in which they were written.
    """

    NAMES = ("key_codes", "key_scales", "value_codes", "value_scales", "time_us", "place", "positions", "sums")

    def __init__(self, geometry: Geometry, codec: Codec, capacity: int, device: torch.device) -> None:
        self.codec = codec
        self.groups = 0
        heads, width, size = geometry.kv_heads, geometry.head_dim, codec.group
        self.key_codes, self.key_scales = codec.new_keys((heads,), capacity, width, device)
        self.value_codes, self.value_scales = codec.new_values((heads,), capacity, width, device)
        self.time_us = torch.zeros(heads, capacity, size, dtype=torch.int64, device=device)
        self.place = torch.zeros(heads, capacity, size, 2, dtype=torch.int16, device=device)
        self.positions = torch.zeros(heads, capacity, size, geometry.axes, dtype=torch.int32, device=device)
        self.sums = torch.zeros(heads, capacity, size, device=device) if geometry.sums else None

    @property
    def capacity(self) -> int:
        return self.key_codes.shape[1]

    @property
    def tokens(self) -> int:
        return self.groups * self.codec.group

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, [H, capacity, ...]."""
        return tuple(getattr(self, name) for name in self.NAMES if getattr(self, name) is not None)

    def live(self, name: str) -> Tensor:
        """One of the metadata tensors of the live tokens, [H, n, ...]."""
        tensor: Tensor = getattr(self, name)
        return tensor[:, : self.groups].flatten(1, 2)

    def put(self, layer: PondLayer, leave: Tensor, first: int, step: int) -> None:
        """Pack tokens of a layer behind the `first` groups, which are the live ones. Can be repeated until the layer's tokens move.

        Args:
            leave: int64 [H, n], slots, ascending; n is a multiple of G. step: tokens coded at a time.
        """
        size = self.codec.group
        groups = leave.shape[1] // size
        for head, slots in enumerate(leave):
            for at in range(0, leave.shape[1], step):
                part = slots[at : at + step]
                to = slice(first + at // size, first + (at + len(part)) // size)
                keys = layer.keys[0, head].index_select(0, part)
                self.codec.encode_keys(keys, self.key_codes[head, to], self.key_scales[head, to])
                del keys
                values = layer.values[0, head].index_select(0, part)
                self.codec.encode_values(values, self.value_codes[head, to], self.value_scales[head, to])
                del values
                for name in self.NAMES[4:]:
                    if (mine := getattr(self, name)) is not None:
                        mine[head, to].flatten(0, 1).copy_(getattr(layer, name)[head].index_select(0, part))
        self.groups = first + groups

    def dropping(self, stay: Tensor) -> list[Callable[[], None]]:
        """The steps that forget all groups but `stay`, int64 [H, g] ascending. See `Steps`."""
        live = [tensor[:, : self.groups] for tensor in self.tensors()]
        return [Rows(live, stay, 1).run, partial(self._settle, stay.shape[1])]

    def _settle(self, groups: int) -> None:
        self.groups = groups

    def read(
        self, head: int, first: int, last: int, keys: Tensor | None, values: Tensor | None, step: int | None = None
    ) -> None:
        """Unpack the tokens `first` to `last` of a head, whole groups, into [last - first, D] each, `step` at a time."""
        part = slice(first // self.codec.group, last // self.codec.group)
        if keys is not None:
            self.codec.decode_keys(self.key_codes[head, part], self.key_scales[head, part], keys, step)
        if values is not None:
            self.codec.decode_values(self.value_codes[head, part], self.value_scales[head, part], values, step)

    def turning(self, head: int, rope: Rope, by: Tensor, step: int) -> Callable[[], None]:
        """The step that turns one head's packed keys by `by`, int64 [n, axes], and writes the new positions down. See `Steps`.

        Tokens of a group may move differently, so a group is unpacked, turned in float32 and packed again: half a step of error
        each time, where storing keys unturned would cost a rotation of every packed key in every forward.
        """
        size, each = self.codec.group, step // self.codec.group

        def make(index: int) -> tuple[Tensor, ...]:
            part = slice(index * each, min((index + 1) * each, self.groups))
            turn = by[part.start * size : part.stop * size]
            if not bool(turn.any()):
                return ()
            keys = torch.empty(len(turn), self.key_scales.shape[3], device=by.device)
            self.read(head, part.start * size, part.stop * size, keys, None)
            rope.rotate_(keys, turn)
            codes = torch.empty_like(self.key_codes[head, part])
            scales = torch.empty_like(self.key_scales[head, part])
            self.codec.encode_keys(keys, codes, scales)
            positions = self.positions[head, part]
            return codes, scales, positions + turn.to(torch.int32).view_as(positions)

        def write(index: int, *made: Tensor) -> None:
            for mine, new in zip((self.key_codes, self.key_scales, self.positions), made, strict=False):
                mine[head, index * each : index * each + len(new)] = new

        return partial(Pieces().run, -(-self.groups // each), make, write)

    def adopt(self, other: Shelf) -> None:
        """Copy the live groups of a shelf of the same shapes."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[:, : other.groups].copy_(theirs[:, : other.groups])
        self.groups = other.groups
