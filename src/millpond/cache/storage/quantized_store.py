"""One layer's quantized tokens, and the buffer that all layers share, where they are dequantized for attention. Does not choose them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from millpond import ops
from millpond.cache.plan import Plan
from millpond.cache.storage.exchange import Slab, attribute, zeros
from millpond.cache.storage.layer import METADATA, PondLayer
from millpond.kv_quantization.quantizer import KVQuantizer
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import InPlace, Pieces, Step
from millpond.positions import Rope


class QuantizedStore:
    """One layer's quantized tokens: `capacity` groups of storage for each head, allocated once.

    Attributes:
        key_codes, key_scales, value_codes, value_scales: as in `KVQuantizer`, [H, capacity, ...].
        time_us, grid_position, positions, accumulated_attention: as in `PondLayer`, [H, capacity, G, ...].
        groups: live groups, in the order in which they were written.
    """

    CODES = ("key_codes", "key_scales", "value_codes", "value_scales")

    def __init__(self, geometry: Geometry, quantizer: KVQuantizer, capacity: int, device: torch.device) -> None:
        self.quantizer = quantizer
        self.groups = 0
        heads, head_dim, size = geometry.kv_heads, geometry.head_dim, quantizer.group
        self.key_codes, self.key_scales = quantizer.new_keys((heads,), capacity, head_dim, device)
        self.value_codes, self.value_scales = quantizer.new_values((heads,), capacity, head_dim, device)
        self.time_us = torch.zeros(heads, capacity, size, dtype=torch.int64, device=device)
        self.grid_position = torch.zeros(heads, capacity, size, 2, dtype=torch.int16, device=device)
        self.positions = torch.zeros(heads, capacity, size, geometry.axes, dtype=torch.int32, device=device)
        summed = geometry.accumulated_attention
        self.accumulated_attention = torch.zeros(heads, capacity, size, device=device) if summed else None

    @property
    def capacity(self) -> int:
        return self.key_codes.shape[1]

    @property
    def tokens(self) -> int:
        return self.groups * self.quantizer.group

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that there are."""
        return tuple(name for name in (*self.CODES, *METADATA) if getattr(self, name) is not None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, [H, capacity, ...]."""
        return tuple(getattr(self, name) for name in self.names)

    def live(self, name: str) -> Tensor:
        """One of the metadata tensors of the live tokens, [H, n, ...]."""
        tensor: Tensor = getattr(self, name)
        return tensor[:, : self.groups].flatten(1, 2)

    def put(self, layer: PondLayer, leave: Tensor, first: int, step: int) -> None:
        """Quantize tokens of a layer behind the `first` groups, which are the live ones. Can be repeated until the layer's tokens move.

        Args:
            leave: int64 [H, n], slots, ascending; n is a multiple of G. step: tokens coded at a time.
        """
        size = self.quantizer.group
        groups = leave.shape[1] // size
        for head, slots in enumerate(leave):
            for at in range(0, leave.shape[1], step):
                part = slots[at : at + step]
                to = slice(first + at // size, first + (at + len(part)) // size)
                keys = layer.keys[0, head].index_select(0, part)
                self.quantizer.quantize_keys(keys, self.key_codes[head, to], self.key_scales[head, to])
                del keys
                values = layer.values[0, head].index_select(0, part)
                self.quantizer.quantize_values(values, self.value_codes[head, to], self.value_scales[head, to])
                del values
                for name in self.names[len(self.CODES) :]:
                    mine: Tensor = getattr(self, name)
                    mine[head, to].flatten(0, 1).copy_(getattr(layer, name)[head].index_select(0, part))
        self.groups = first + groups

    def dropping(self, stay: Tensor) -> list[Step]:
        """The steps that forget all groups but `stay`, int64 [H, g] ascending. See `Steps`."""
        live = [tensor[:, : self.groups] for tensor in self.tensors()]
        return [InPlace(ops.move_rows, stay, live, 1).run, partial(self._set_groups, stay.shape[1])]

    def _set_groups(self, groups: int) -> None:
        self.groups = groups

    def read(
        self, head: int, first: int, last: int, keys: Tensor | None, values: Tensor | None, step: int | None = None
    ) -> None:
        """Dequantize the tokens `first` to `last` of a head, whole groups, into [last - first, D] each, `step` at a time."""
        part = slice(first // self.quantizer.group, last // self.quantizer.group)
        if keys is not None:
            self.quantizer.dequantize_keys(self.key_codes[head, part], self.key_scales[head, part], keys, step)
        if values is not None:
            self.quantizer.dequantize_values(self.value_codes[head, part], self.value_scales[head, part], values, step)

    def rerotation(self, head: int, rope: Rope, by: Tensor, step: int) -> Step:
        """The step that rerotates one head's quantized keys by `by`, int64 [n, axes], and writes the new positions down. See `Steps`.

        Tokens of a group may move differently, so a group is dequantized, rerotated in float32 and quantized again: half a step of
        error each time, where storing keys without rotation would cost one of every quantized key in every forward.
        """
        size, each = self.quantizer.group, step // self.quantizer.group

        def make(index: int) -> tuple[Tensor, ...]:
            part = slice(index * each, min((index + 1) * each, self.groups))
            shift = by[part.start * size : part.stop * size]
            if not bool(shift.any()):
                return ()
            keys = torch.empty(len(shift), self.key_scales.shape[3], device=by.device)
            self.read(head, part.start * size, part.stop * size, keys, None)
            rope.rotate_(keys, shift)
            codes = torch.empty_like(self.key_codes[head, part])
            scales = torch.empty_like(self.key_scales[head, part])
            self.quantizer.quantize_keys(keys, codes, scales)
            positions = self.positions[head, part]
            return codes, scales, positions + shift.to(torch.int32).view_as(positions)

        def write(index: int, *made: Tensor) -> None:
            for mine, new in zip((self.key_codes, self.key_scales, self.positions), made, strict=False):
                mine[head, index * each : index * each + len(new)] = new

        return partial(Pieces().run, -(-self.groups // each), make, write)

    def resized(self, groups: int) -> list[Slab]:
        """Every tensor, as it becomes `groups` groups large."""
        return [attribute(self, name, groups, min(groups, self.groups)) for name in self.names]

    def state(self) -> dict[str, Tensor]:
        """The live groups, [H, groups, ...] views by name."""
        return {name: getattr(self, name)[:, : self.groups] for name in self.names}

    def restore(self, groups: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy what the `state` of a quantized store of `groups` live groups says."""
        for name, theirs in tensors.items():
            getattr(self, name)[:, :groups].copy_(theirs)
        self.groups = groups


class DequantizationBuffer:
    """Where one layer's tokens of both kinds lie side by side in the model's dtype: keys, values [1, H, n, D], shared.

    What one layer put here is gone when the next one has.
    """

    def __init__(
        self, geometry: Geometry, plan: Plan, tier: QuantizedTier, device: torch.device, ledger: Ledger
    ) -> None:
        self.geometry, self.tier, self.device, self.ledger = geometry, tier, device, ledger
        self.allocate(plan)

    def allocate(self, plan: Plan) -> None:
        """Make it as large as a plan says."""
        self.step = self.tier.step(plan.chunk)
        self.quantization_bytes = self.tier.quantizer.scratch_bytes(self.step, self.geometry.head_dim)
        self.ledger.hold("dequantization buffer", plan.dequantization_bytes)
        shape = 1, self.geometry.kv_heads, plan.quantized_tokens + plan.slots, self.geometry.head_dim
        self.keys = zeros(shape, self.geometry.dtype, self.device)
        self.values = zeros(shape, self.geometry.dtype, self.device)

    def clear(self) -> None:
        """Give the storage back."""
        self.keys = self.values = self.keys.new_empty(0)
        self.ledger.hold("dequantization buffer", 0)

    def dequantize(self, store: QuantizedStore, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Dequantize a store and put a layer's full keys and values [1, H, n, D] behind it; returns views of both."""
        quantized = store.tokens
        end = quantized + keys.shape[2]
        with self.ledger.borrow("scratch", self.quantization_bytes):
            for head, (own, other) in enumerate(zip(self.keys[0], self.values[0], strict=True)):
                store.read(head, 0, quantized, own[:quantized], other[:quantized], self.step)
        self.keys[:, :, quantized:end].copy_(keys)
        self.values[:, :, quantized:end].copy_(values)
        return self.keys[:, :, :end], self.values[:, :, :end]
