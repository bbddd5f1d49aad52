"""Storage in two precisions: important tokens as they came, the others in few bits, in groups that were written together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Choose, Relocation, Step, Storage
from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer, stream_order
from millpond.cache.storage.quantized_store import DequantizationBuffer, QuantizedStore
from millpond.errors import BudgetError
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.policies.base import View


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
        return None if layer.store.groups <= groups else _surviving_groups(layer, view, start, groups, choose)

    def compaction(self, index: int, keep: Tensor, stay: Tensor | None, start: int, chunk: int) -> list[Step]:
        return self._tiered[index].quantization_steps(keep, stay, start, chunk)

    def dropping(self, index: int, stay: Tensor) -> list[Step]:
        return self._tiered[index].store.dropping(stay)

    def relocation(self, old: Plan, new: Plan, exchanged: bool) -> Relocation:
        allocate = self.buffer.allocate
        return Relocation(clear=[self.buffer.clear], forth=[partial(allocate, new)], back=[partial(allocate, old)])

    def unchanged(self, old: Plan, new: Plan) -> Plan | None:
        return None  # the plans differ in what is quantized, too


def _surviving_groups(layer: MixedPrecisionLayer, view: View, start: int, groups: int, choose: Choose) -> Tensor:
    """Which quantized groups stay, int64 [H, groups] ascending: those with the most tokens that the policy would keep.

    Args:
        view: of the layer's full tokens, whose protected ones the policy is shown beside the quantized ones. start: their first slot.
        groups: how many stay, fewer than there are. choose: the policy's `keep`.
    """
    quantized, size, live = layer.store.tokens, layer.store.quantizer.group, layer.store.groups
    if not groups:
        return torch.empty(view.heads, 0, dtype=torch.int64, device=view.keys.device)
    shown, order = _quantized_view(layer, view, start)
    keep = choose(shown, groups * size + shown.tokens - quantized)
    del shown
    # Of equals the group that was written later stays.
    later = torch.arange(live, device=view.keys.device)
    votes = torch.empty(view.heads, live, dtype=torch.int64, device=view.keys.device)
    for head, kept in enumerate(keep):
        chosen = order[head, kept]
        group = chosen[chosen < quantized].div_(size, rounding_mode="floor")
        votes[head] = torch.bincount(group, minlength=live).mul_(live) + later
    return votes.topk(groups, dim=1).indices.sort(dim=1).values


def _quantized_view(layer: MixedPrecisionLayer, view: View, start: int) -> tuple[View, Tensor]:
    """The quantized tokens and the protected full ones on the dequantization buffer in stream order, and where each is stored, int64 [H, n].

    A stored index below the number of quantized tokens is one of theirs.
    """
    store, buffer, step = layer.store, layer.buffer, layer.buffer.step
    quantized, heads, device = store.tokens, view.heads, view.keys.device
    count = quantized + int(view.protected[0].sum())
    order = torch.empty(heads, count, dtype=torch.int64, device=device)
    time_us = torch.empty_like(order)
    grid_position = torch.empty(heads, count, 2, dtype=torch.int16, device=device)
    received = view.accumulated_attention
    attention = None if received is None else torch.empty(heads, count, device=device)
    keys, values = buffer.keys[0, :, :count], buffer.values[0, :, :count]
    for head in range(heads):
        full = view.protected[head].nonzero()[:, 0]
        both = partial(_both, store, head, full)
        on_grid = both("grid_position", view.grid_position)
        first = layer.positions[head, start : start + view.tokens, 0].index_select(0, full)
        along = stream_order(torch.cat([store.live("positions")[head, :, 0], first]), on_grid)
        order[head], grid_position[head] = along, on_grid[along]
        time_us[head] = both("time_us", view.time_us)[along]
        if attention is not None and received is not None:
            attention[head] = both("accumulated_attention", received)[along]
        rank = torch.empty_like(along).index_copy_(0, along, torch.arange(count, device=device))
        for at in range(0, quantized, step):
            end = min(at + step, quantized)
            rows = keys.new_empty(end - at, keys.shape[2])
            store.read(head, at, end, rows, None)
            keys[head].index_copy_(0, rank[at:end], rows)
            store.read(head, at, end, None, rows)
            values[head].index_copy_(0, rank[at:end], rows)
        for part, to in zip(full.split(step), rank[quantized:].split(step), strict=True):
            keys[head].index_copy_(0, to, view.keys[head].index_select(0, part))
            values[head].index_copy_(0, to, view.values[head].index_select(0, part))
    # The deeper layer's scores are those of its full tokens.
    shown = replace(
        view, keys=keys, values=values, time_us=time_us, grid_position=grid_position, protected=order >= quantized,
        accumulated_attention=attention, deeper_scores=None, carried_scores=None, positions=None,
    )  # fmt: skip
    return shown, order


def _both(store: QuantizedStore, head: int, full: Tensor, name: str, theirs: Tensor) -> Tensor:
    """One kind of metadata of a head's quantized tokens and of the full ones that `full` names, [n, ...]."""
    return torch.cat([store.live(name)[head], theirs[head].index_select(0, full)])
