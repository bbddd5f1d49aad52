"""Storage in two precisions: important tokens as they came, the others in few bits, in groups that were written together."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Choose, Relocation, Step, Storage
from millpond.cache.storage.dequantization import DequantizationBuffer
from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer
from millpond.cache.storage.surviving import surviving_groups
from millpond.errors import BudgetError
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.policies.base import View

__all__ = ["MixedPrecisionStorage"]


class MixedPrecisionStorage(Storage):
    """Tokens that would be forgotten are quantized instead (MiKV, Yang et al., 2024), and forgotten later.

    A layer keeps two kinds of tokens: prompt, latest frames and the important ones as they are, and beside them quantized ones
    in groups. A group is written once and lives or dies as a whole, so nothing is quantized twice and nothing drifts from pass to pass.
    Attention reads quantized and full tokens side by side in one buffer that all layers share.

    Attributes:
        buffer: that buffer.
    """

    def __init__(
        self, geometry: Geometry, plan: Plan, tier: QuantizedTier, device: torch.device, ledger: Ledger
    ) -> None:
        self.tier = tier
        self.buffer = DequantizationBuffer(geometry, plan, tier, device, ledger)
        sizes = plan.slots, self.groups_of(plan)
        self._tiered = [MixedPrecisionLayer(geometry, *sizes, self.buffer, device) for _ in range(geometry.layers)]
        super().__init__(geometry, self._tiered, ledger)

    @property
    def quantized_tokens(self) -> int:
        return self._tiered[0].store.tokens

    @property
    def quantized_groups(self) -> int:
        return self._tiered[0].store.groups

    def groups_of(self, plan: Plan) -> int:
        return plan.quantized_tokens // self.tier.quantizer.group

    @property
    def live_bytes(self) -> int:
        return super().live_bytes + self.tier.quantized_bytes(self.geometry, self.quantized_tokens)

    @property
    def buffer_bytes(self) -> int:
        return self.ledger.account("dequantization buffer")

    def targets(self, plan: Plan, tokens: int, slots: int) -> list[int]:
        most = tokens - plan.quantized_tokens
        return [most, slots] if slots < most else [slots]  # no more at once than fit

    def whole(self, tokens: int, slots: int) -> int:
        group = self.tier.quantizer.group
        slots = tokens - -(-(tokens - slots) // group) * group
        if slots < 1:
            raise BudgetError(f"tokens are quantized {group} at a time, which leaves none of {tokens} in full")
        return slots

    def groups_beside(self, leave: int) -> int:
        store = self._tiered[0].store
        return store.capacity - leave // store.quantizer.group

    def surviving(self, index: int, view: View, start: int, groups: int, choose: Choose) -> Tensor | None:
        layer = self._tiered[index]
        return None if layer.store.groups <= groups else surviving_groups(layer, view, start, groups, choose)

    def compaction(self, index: int, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Step]:
        return self._tiered[index].quantization_steps(keep, stay, start, chunk)

    def dropping(self, index: int, stay: Tensor) -> list[Step]:
        return self._tiered[index].store.dropping(stay)

    def relocation(self, old: Plan, new: Plan, exchanged: bool) -> Relocation:
        allocate = self.buffer.allocate
        return Relocation(clear=[self.buffer.clear], forth=[partial(allocate, new)], back=[partial(allocate, old)])

    def unchanged(self, old: Plan, new: Plan) -> Plan | None:
        return None  # the plans differ in what is quantized, too
