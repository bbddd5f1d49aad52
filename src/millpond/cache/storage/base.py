"""What every kind of storage does: tokens are appended, truncated, compacted, moved to another size and copied in place.

A kind says what differs: how many tokens may leave at once, where they go, what is done around a change of size. Everything that moves
is given as steps (see `millpond.memory.resumable.Steps`), which whoever holds the storage carries out. Does not choose what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from millpond import ops
from millpond.cache.plan import Plan
from millpond.cache.storage.exchange import Slab
from millpond.cache.storage.layer import LayerState, PondLayer
from millpond.cache.storage.reflection import reflection
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Step
from millpond.policies.base import View

__all__ = ["Choose", "PerLayerStorage", "Relocation", "Step", "Storage", "StorageState"]

Choose = Callable[[View, int], Tensor]
"""A policy's `keep`, held to its contract."""


@dataclass(frozen=True, eq=False)
class StorageState:
    """What a storage holds: each layer's live tokens, and the slots that each layer has."""

    layers: tuple[LayerState, ...]
    capacities: tuple[int, ...]


@dataclass(frozen=True)
class Relocation:
    """What a storage does around the exchange of its tensors for larger or smaller ones.

    Attributes:
        before: once, before anything is exchanged. clear: in front of an exchange, in either direction.
        forth, back: behind the exchange to the new sizes, and behind the one back to the old ones.
    """

    before: list[Step] = field(default_factory=list)
    clear: list[Step] = field(default_factory=list)
    forth: list[Step] = field(default_factory=list)
    back: list[Step] = field(default_factory=list)


class Storage:
    """The tokens of all layers.

    Args:
        geometry: shapes and dtype. layers: one for each decoder layer. ledger: "storage" is held in it from the start.

    Attributes:
        layers: to which transformers appends.
        ahead: how many tokens more than the first layer each one holds, between forwards.
    """

    layer_budgets: ClassVar[bool] = False
    """Whether layers can be granted different numbers of tokens."""

    def __init__(self, geometry: Geometry, layers: Sequence[PondLayer], ledger: Ledger) -> None:
        self.geometry, self.layers, self.ledger = geometry, list(layers), ledger
        self.ahead = [0] * geometry.layers

    @property
    def length(self) -> int:
        """Live slots of the first layer."""
        return self.layers[0].length

    @property
    def mean_length(self) -> int:
        """Live slots on average over the layers, rounded down; between forwards."""
        return self.length + sum(self.ahead) // len(self.ahead)

    @property
    def free(self) -> int:
        """Slots not in use, in the layer that has fewest."""
        return min(layer.capacity - layer.length for layer in self.layers)

    @property
    def uneven(self) -> bool:
        """Whether layers hold different numbers of tokens."""
        return any(self.ahead)

    @property
    def quantized_tokens(self) -> int:
        """Tokens that each head of each layer holds in few bits."""
        return 0

    @property
    def quantized_groups(self) -> int:
        """Groups in which they were written."""
        return 0

    def groups_of(self, plan: Plan) -> int:
        """Groups that a plan's storage has space for."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, metadata included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def live_bytes(self) -> int:
        """Bytes that the live tokens take."""
        return sum(layer.length for layer in self.layers) * self.geometry.bytes_per_token // len(self.layers)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that holds nothing between forwards, and is given back while tensors are exchanged."""
        return 0

    def write_metadata(self, time_us: Tensor, grid_position: Tensor, positions: Tensor) -> None:
        """Write the metadata of the n tokens that every layer appends next: int64 [n], int16 [n, 2], int [n, axes]."""
        ops.write_metadata(time_us, grid_position, positions, [layer.metadata() for layer in self.layers])

    def reserve(self, count: int) -> None:
        """Take `count` slots behind the live ones of every layer as live, to be written to."""
        for layer in self.layers:
            layer.length += count

    def truncating(self, length: int) -> list[Step]:
        """The steps that forget everything from slot `length` of the first layer on, and as much in the others."""
        lengths = [min(layer.length, length + ahead) for layer, ahead in zip(self.layers, self.ahead, strict=True)]
        return [partial(layer.set_length, each) for layer, each in zip(self.layers, lengths, strict=True)]

    def cutting_out(self, start: int, count: int, chunk: int) -> list[Step]:
        """The steps that take `count` slots from slot `start` of the first layer on out; what lies behind them moves down."""
        behind = torch.arange(count, self.length - start, device=self.layers[0].device)
        behind = behind.repeat(self.geometry.kv_heads, 1)
        steps: list[Step] = []
        for layer, ahead in zip(self.layers, self.ahead, strict=True):
            steps += layer.compaction(behind, start + ahead, chunk)
        return steps

    def setting_length(self, length: int) -> list[Step]:
        """The steps after which the first layer has `length` live slots, and each of the others as many more as it is ahead."""
        each = zip(self.layers, self.ahead, strict=True)
        return [partial(layer.set_length, length + ahead) for layer, ahead in each]

    def turning_around(self, start: int, count: int, scratch: int) -> list[Step]:
        """The steps that exchange the `count` slots from slot `start` of the first layer on with the last ones, in reverse.

        Args:
            count: more than half of them say all. scratch: bytes that may be worked on at once.
        """
        steps: list[Step] = []
        for layer, ahead in zip(self.layers, self.ahead, strict=True):
            behind = [tensor[:, start + ahead :] for tensor in layer.tensors()]
            steps += reflection(behind, min(count, behind[0].shape[1] // 2), scratch)
        return steps

    def clear(self) -> None:
        """Forget everything; the storage stays."""
        for layer in self.layers:
            layer.reset()
        self.ahead = [0] * len(self.layers)

    def targets(self, plan: Plan, tokens: int, slots: int) -> list[int]:
        """To how many tokens in full each of the passes compacts that take `tokens` to `slots`."""
        return [slots]

    def whole(self, tokens: int, slots: int) -> int:
        """The most of `tokens`, no more than `slots`, that can stay in full when the others leave.

        Raises:
            BudgetError: none can.
        """
        return slots

    def groups_beside(self, leave: int) -> int:
        """Quantized groups of a layer that fit when `leave` more tokens are quantized."""
        return 0

    def surviving(self, index: int, view: View, start: int, groups: int, choose: Choose) -> Tensor | None:
        """Which `groups` quantized groups of a layer stay, int64 [H, groups] ascending; None when there are no more than that.

        Args:
            view: of the layer's tokens in full. start: their first slot. choose: what chooses among the quantized ones.
        """
        return None

    def compaction(self, index: int, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Step]:
        """A layer's steps.

        Args:
            keep: int64 [H, S], ascending, relative to slot `start`: tokens that stay in full. stay: what `surviving` gave.
            chunk: tokens of a head moved at a time.
        """
        return self.layers[index].compaction(keep, start, chunk)

    def dropping(self, index: int, stay: Tensor) -> list[Step]:
        """A layer's steps that forget all quantized groups but `stay`, which `surviving` gave."""
        return []

    def finishing(self, lengths: Sequence[int], free: int, chunk: int) -> list[Step]:
        """The steps after those of the layers, which hold so many tokens then, and on average `free` slots that are not in use."""
        return [partial(self._set_ahead, [length - lengths[0] for length in lengths])]

    def _set_ahead(self, ahead: list[int]) -> None:
        self.ahead = ahead

    def resized(self, plan: Plan, length: int) -> list[Slab]:
        """Every tensor, as it becomes as large as a plan says, with at most `length` live slots on average over the layers."""
        groups = self.groups_of(plan)
        return [slab for layer in self.layers for slab in layer.resized(plan.slots, length, groups)]

    def relocation(self, old: Plan, new: Plan, exchanged: bool) -> Relocation:
        """What is done around the exchange of tensors; `exchanged`: whether there are any."""
        return Relocation()

    def unchanged(self, old: Plan, new: Plan) -> Plan | None:
        """A plan of more slots on the storage of the old one; None: that cannot be."""
        return new.with_slots(old.slots)

    def accumulated(self, length: int) -> list[Tensor]:
        """Views of the attention summed up by all tokens in front of slot `length` of the first layer, quantized ones included."""
        each = zip(self.layers, self.ahead, strict=True)
        return [attention for layer, ahead in each for attention in layer.accumulated(length + ahead)]

    def state(self) -> StorageState:
        """What is live, between forwards."""
        layers, capacities = zip(*((layer.state(), layer.capacity) for layer in self.layers), strict=True)
        return StorageState(layers, capacities)

    def restore(self, state: StorageState) -> None:
        """Copy what the `state` of a storage of the same kind and plan says."""
        for layer, each in zip(self.layers, state.layers, strict=True):
            layer.restore(each)
        self.ahead = [layer.length - self.length for layer in self.layers]


class PerLayerStorage(Storage):
    """The plainest storage: every layer has tensors of its own, of `Plan.slots` slots."""

    def __init__(self, geometry: Geometry, plan: Plan, device: torch.device, ledger: Ledger) -> None:
        layers = [PondLayer(geometry, plan.slots, device) for _ in range(geometry.layers)]
        super().__init__(geometry, layers, ledger)
