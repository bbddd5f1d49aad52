"""Moving a pond into larger or smaller storage, one tensor at a time, without ever passing the cap.

A tensor is replaced by allocating its successor beside it where the cap has room for both. Where it has not, its live
rows wait in the unused tails of the other layers' tensors while the old storage is freed first. With a low-bit tier there is
always room: the desk, which is larger than any tensor and holds nothing between forwards, is given back first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond.errors import BudgetError

if TYPE_CHECKING:
    from millpond.cache.arena import Arena
    from millpond.cache.layer import PondLayer
    from millpond.cache.ledger import Ledger
    from millpond.cache.pond import Pond
    from millpond.cache.shelf import Shelf
    from millpond.cache.tier import Desk
    from millpond.plan import Plan

__all__ = ["resize_pond"]

_VECTORS = ("keys", "values")
_METADATA = ("time_us", "place", "positions", "sums")


def resize_pond(pond: Pond, plan: Plan) -> None:
    """See `Pond.resize`."""
    if pond.desk is not None:
        _resize_tiers(pond, pond.desk, plan)
        return
    if pond.arena is not None:
        _resize_arena(pond, pond.arena, plan)
        return
    old, ledger = pond.plan, pond.ledger
    shrinking = plan.slots < old.slots
    if pond.policy.capped:
        assert plan.budget is not None
        limit = max(old.budget or 0, plan.budget)
    else:
        limit = None
    if shrinking:
        most = plan.slots - plan.reserve_tokens
        if limit is not None and ledger.held + _tensor_bytes(pond, plan.slots) > limit:
            # No room for a copy of one tensor: its live rows must fit into the tails of the others.
            most = min(most, plan.slots - -(-plan.slots // (2 * pond.geometry.layers)))
        target = min(plan.memory_tokens, most - plan.prompt_tokens)
        if target < 1:
            raise BudgetError(f"the pond cannot shrink to {plan.slots} slots", least=old.budget)
        pond.compact(target)
    elif not _can_grow(pond, plan.slots, limit):
        # Too small a step to be worth a second copy of a tensor, which the cap has no room for: keep the storage.
        spare = plan.slots - old.slots
        plan = replace(plan, slots=old.slots, memory_tokens=max(plan.group_tokens, plan.memory_tokens - spare))
    ledger.limit = limit
    if plan.slots != old.slots:
        # The small tensors move while there is most room: last when shrinking, first when growing.
        for names in (_VECTORS, _METADATA) if shrinking else (_METADATA, _VECTORS):
            for layer in pond.layers:
                for name in names:
                    if getattr(layer, name) is not None:
                        _move(pond, layer, name, plan.slots, limit)
    ledger.limit = plan.budget if pond.policy.capped else None
    pond.plan = plan


def _resize_tiers(pond: Pond, desk: Desk, plan: Plan) -> None:
    old, ledger = pond.plan, pond.ledger
    groups = plan.packed_tokens // desk.tier.codec.group
    if plan.slots < old.slots:
        pond.compact(plan.memory_tokens)
    pond.forget_packed(groups)
    assert plan.budget is not None
    ledger.limit = max(old.budget or 0, plan.budget)
    desk.clear()
    fuller, deeper = plan.slots > old.slots, plan.packed_tokens > old.packed_tokens
    for grow in (False, True):
        for layer in pond.layers:
            shelf = layer.shelf
            if fuller == grow and plan.slots != old.slots:
                for name in (*_VECTORS, *_METADATA):
                    _copy(ledger, layer, name, 2 if name in _VECTORS else 1, plan.slots, layer.length)
            if deeper == grow and plan.packed_tokens != old.packed_tokens:
                for name in shelf.NAMES:
                    _copy(ledger, shelf, name, 1, groups, shelf.groups)
    desk.allocate(plan)
    ledger.limit = plan.budget
    pond.plan = plan


def _copy(ledger: Ledger, holder: PondLayer | Shelf, name: str, axis: int, size: int, live: int) -> None:
    """Replace a tensor of a layer or shelf by one of `size` along `axis` with the same live part, where there is room for both."""
    old: Tensor | None = getattr(holder, name)
    if old is None:
        return
    shape = list(old.shape)
    shape[axis] = size
    ledger.hold("storage", ledger.account("storage") + old.element_size() * torch.Size(shape).numel())
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    new.narrow(axis, 0, live).copy_(old.narrow(axis, 0, live))
    setattr(holder, name, new)
    freed = old.untyped_storage().nbytes()
    del old
    ledger.hold("storage", ledger.account("storage") - freed)


def _resize_arena(pond: Pond, arena: Arena, plan: Plan) -> None:
    """The same for layers in one arena: its keys and its values are one tensor each, so less fits beside the old ones.

    Where even the live rows of one do not fit into the tail of the other, shrinking forgets down to half of the new slots,
    and growing leaves the storage as it is.
    """
    old, ledger, layers = pond.plan, pond.ledger, len(pond.layers)
    assert plan.budget is not None  # layer budgets have a cap
    limit, shrinking = max(old.budget or 0, plan.budget), plan.slots < old.slots
    small, large = (layers * _tensor_bytes(pond, slots) for slots in (old.slots, plan.slots))
    held = ledger.held
    if shrinking:
        target = min(plan.memory_tokens, plan.slots - plan.reserve_tokens - plan.prompt_tokens)
        if held + large > limit:
            target = min(target, plan.slots // 2 - plan.prompt_tokens)
        if target < 1:
            raise BudgetError(f"the pond cannot shrink to {plan.slots} slots", least=old.budget)
        pond.compact(target)
    else:
        held += (plan.slots - old.slots) * (pond.geometry.bytes_per_token - pond.geometry.kv_bytes_per_token)
        live = sum(layer.length for layer in pond.layers)
        beside = held + large <= limit or 2 * live <= layers * old.slots
        if not beside or (held + 2 * large - small > limit and 2 * live > layers * plan.slots):
            spare = plan.slots - old.slots
            plan = replace(plan, slots=old.slots, memory_tokens=max(plan.group_tokens, plan.memory_tokens - spare))
    ledger.limit = limit
    if plan.slots != old.slots:
        with ledger.borrow("scratch", old.scratch_bytes):
            rows = arena.pack(old.chunk)
        for kind in (*arena.vectors, *arena.metadata) if shrinking else (*arena.metadata, *arena.vectors):
            _replace(pond, arena, kind, rows, plan.slots * layers, limit)
        share = (plan.slots * layers - sum(layer.length for layer in pond.layers)) // layers
        arena.unpack([layer.length + share for layer in pond.layers], old.chunk)
    ledger.limit = plan.budget
    pond.plan = plan


def _replace(pond: Pond, arena: Arena, kind: str, rows: int, slots: int, limit: int) -> None:
    """Give a packed arena storage of another size for one kind, with the same first `rows` rows."""
    old, ledger = arena.flat(kind), pond.ledger
    old_size = old.untyped_storage().nbytes()
    size = old_size // len(old) * slots * pond.geometry.kv_heads
    held = ledger.account("storage")
    if kind in arena.metadata or ledger.held + size <= limit:
        ledger.hold("storage", held + size)
        new = arena.empty(kind, slots)
        new[:rows].copy_(old[:rows])
        arena.replace(kind, new)
        del old
        ledger.hold("storage", held + size - old_size)
        return
    (other,) = (name for name in arena.vectors if name != kind)
    tail = arena.flat(other)[rows : 2 * rows]
    tail.copy_(old[:rows])
    arena.replace(kind, old[:0].clone())
    del old
    ledger.hold("storage", held - old_size + size)
    new = arena.empty(kind, slots)
    new[:rows].copy_(tail)
    arena.replace(kind, new)


def _tensor_bytes(pond: Pond, slots: int) -> int:
    return pond.geometry.kv_heads * slots * pond.geometry.vector_bytes


def _can_grow(pond: Pond, slots: int, limit: int | None) -> bool:
    """Whether every tensor in turn finds room: beside the old one, or for its live rows in the others' tails."""
    if limit is None:
        return True
    count, held = 2 * pond.geometry.layers, pond.ledger.held
    held += (slots - pond.capacity) * (pond.geometry.bytes_per_token - pond.geometry.kv_bytes_per_token)
    small, large = _tensor_bytes(pond, pond.capacity), _tensor_bytes(pond, slots)
    for moved in range(count):
        tails = moved * (slots - pond.length) + (count - 1 - moved) * (pond.capacity - pond.length)
        if held + large > limit and tails < pond.length:
            return False
        held += large - small
    return True


def _move(pond: Pond, layer: PondLayer, name: str, slots: int, limit: int | None) -> None:
    """Replace one tensor of a layer by one of `slots` slots that holds the same live rows."""
    old: Tensor = getattr(layer, name)
    length, axis = layer.length, 2 if name in _VECTORS else 1
    shape = list(old.shape)
    shape[axis] = slots
    size, ledger = old.element_size() * torch.Size(shape).numel(), pond.ledger
    old_size = old.untyped_storage().nbytes()
    if limit is None or ledger.held + size <= limit or name in _METADATA:
        del old
        _copy(ledger, layer, name, axis, slots, length)
        return
    tails = _stash(pond, old)
    setattr(layer, name, old.new_empty(0))
    del old
    ledger.hold("storage", ledger.account("storage") - old_size + size)
    new = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    first = 0
    for tail in tails:
        new[:, :, first : first + tail.shape[2]].copy_(tail)
        first += tail.shape[2]
    setattr(layer, name, new)


def _stash(pond: Pond, tensor: Tensor) -> list[Tensor]:
    """Copy a tensor's live rows into the unused tails of the others; return the pieces in order."""
    pieces: list[Tensor] = []
    first = 0
    for layer in pond.layers:
        for name in _VECTORS:
            other: Tensor = getattr(layer, name)
            if other is tensor or other.numel() == 0:
                continue
            count = min(other.shape[2] - layer.length, layer.length - first)
            if count <= 0:
                continue
            tail = other[:, :, layer.length : layer.length + count]
            tail.copy_(tensor[:, :, first : first + count])
            pieces.append(tail)
            first += count
    if first < pond.length:
        raise RuntimeError("the tails cannot hold a tensor's live rows")  # resize_pond made sure that they can
    return pieces
