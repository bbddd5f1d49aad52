"""One pass of a compaction: asks the policy layer by layer, holds it to its contract, and has the layers move, pack or hand over.

A policy that fails after some layers have moved is replaced by recency for the rest of the pass, so that the memory stays whole.
Knows the pond it works on; nothing about budgets beyond the scratch that it borrows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond import native
from millpond.cache.tier import TieredLayer, surviving_groups
from millpond.errors import BudgetError, PolicyError
from millpond.policies.allocation import apportion
from millpond.policies.base import TEXT, View, keep_top
from millpond.policies.matching import carried_over

if TYPE_CHECKING:
    from millpond.cache.host import HostTier
    from millpond.cache.layer import PondLayer
    from millpond.cache.pond import Pond

__all__ = ["compact_pond", "forget_packed"]


def compact_pond(pond: Pond, slots: int) -> None:
    """See `Pond.compact`."""
    most = pond.full_tokens - pond.plan.packed_tokens
    if pond.desk and slots < most:
        _pass(pond, most)  # more than the tier holds at once
    _pass(pond, slots)


def _pass(pond: Pond, slots: int) -> None:
    tokens, start, plan, before = pond.full_tokens, pond.plan.prompt_tokens, pond.plan, pond.memory_tokens
    if pond.policy.whole_frames and pond._recent:
        slots -= slots % pond._recent[-1][1]
    if slots >= tokens:
        return
    if slots < 1:
        raise BudgetError(f"the policy {pond.policy.name!r} keeps whole frames, and not one fits")
    if pond.desk:
        group = pond.desk.tier.codec.group
        slots = tokens - -(-(tokens - slots) // group) * group
        if slots < 1:
            raise BudgetError(f"tokens are packed {group} at a time, which leaves none of {tokens} in full")
    since, text = pond._protect(slots)
    fault: Exception | None = None
    lead: Tensor | None = None  # what the first layer kept, where all must keep the same
    deeper: Tensor | None = None  # what the policy left at the layer before, for the tokens of the one to come
    moved = False
    with pond.ledger.borrow("scratch", plan.scratch_bytes):
        granted = _grant(pond, slots, since, text)
        order = list(enumerate(zip(pond.layers, granted, strict=True)))
        for index, (layer, share) in reversed(order) if pond.policy.deepest_first else order:
            if share == layer.length - start:
                deeper = None
                continue
            view = pond._view(index, layer, since, text)
            if pond.policy.deepest_first and fault is None:
                nothing = torch.full(view.time_us.shape, torch.nan, device=pond.device)
                view, deeper = replace(view, deeper=deeper, carry=nothing), None
                del nothing
            try:
                newest = partial(_newest, lead=lead)
                keep, stay = _choose(pond, layer, view, share, pond.policy.keep if fault is None else newest)
                _check_alike(pond, keep, lead)
                if fault is None:
                    moved |= pond.policy.merges
                    pond.policy.merge(view, keep)
            except Exception as error:
                if not moved:
                    raise
                # Some layers have moved already: finish the pass by recency, so that the memory stays whole.
                fault = error
                keep, stay = _choose(pond, layer, view, share, partial(_newest, lead=lead))
            carry = view.carry if fault is None and index else None
            del view
            if carry is not None:
                deeper = _hand_on(pond, index, carry)
                del carry
            if pond.host is not None:
                first = lead is None
                lead = keep[0].clone() if lead is None else lead
                _spill(pond, index, layer, lead, pond.host, first)
            if isinstance(layer, TieredLayer):
                layer.demote(keep, stay, start, plan.chunk)
            else:
                layer.compact(keep, start, plan.chunk)
            moved = True
        if pond.arena:
            # Beside its memory every layer keeps the same room: blocks and turns are equally long in all of them.
            pond.arena.cut([start + share + pond.capacity - start - slots for share in granted], plan.chunk)
    pond._ahead = [layer.length - pond.length for layer in pond.layers]
    pond.compactions += 1
    pond.evicted += before - pond.memory_tokens
    # What was not protected is no longer whole in every head, and can never be protected again.
    pond._recent = deque(group for group in pond._recent if group[0] >= since)
    pond._text = text
    if fault is not None:
        raise fault


def _hand_on(pond: Pond, index: int, carry: Tensor) -> Tensor:
    """What a layer that has not moved yet leaves, float32 [H, n], for the tokens of the next shallower one: float32 [H, m]."""
    start = pond.plan.prompt_tokens
    tokens = [
        tensor[:, start : layer.length]
        for layer in (pond.layers[index], pond.layers[index - 1])
        for tensor in (layer.time_us, layer.place)
    ]
    return carried_over(carry, *tokens)


def _spill(pond: Pond, index: int, layer: PondLayer, keep: Tensor, host: HostTier, first: bool) -> None:
    """Copy the frames that a layer is about to forget to host memory; `keep`, int64 [S], is that of every head.

    The `first` layer of a pass says which frames they are.
    """
    start = pond.plan.prompt_tokens
    with host.timed():
        gone = torch.ones(layer.length - start, dtype=torch.bool, device=pond.device)
        gone[keep] = False
        gone &= layer.place[0, start : layer.length, 0] != TEXT
        leave = gone.nonzero()[:, 0]
        leave += start
        del gone
        if first:
            time_us, place, positions = (
                tensor[0].index_select(0, leave) for tensor in (layer.time_us, layer.place, layer.positions)
            )
            host.admit(time_us, place, positions, pond.plan.group_tokens)
            del time_us, place, positions
        host.store(index, layer, leave, max(1, pond.plan.chunk // pond.geometry.kv_heads))


def _choose(
    pond: Pond, layer: PondLayer, view: View, slots: int, choose: Callable[[View, int], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The full tokens that stay, and the packed groups; None for the groups when all of them may."""

    choose = _checked(pond, choose)
    keep = choose(view, slots)
    if not isinstance(layer, TieredLayer):
        return keep, None
    groups = layer.shelf.capacity - (view.tokens - slots) // layer.shelf.codec.group
    if layer.shelf.groups <= groups:
        return keep, None
    return keep, surviving_groups(layer, view, pond.plan.prompt_tokens, groups, choose)


def forget_packed(pond: Pond, groups: int) -> None:
    """See `Pond.forget_packed`."""
    before, start = pond.memory_tokens, pond.plan.prompt_tokens
    since, text = pond._protect(pond.full_tokens)
    choose, fault = _checked(pond, pond.policy.keep), None
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        for index, layer in enumerate(pond.layers):
            if not isinstance(layer, TieredLayer) or layer.shelf.groups <= groups:
                continue
            view = pond._view(index, layer, since, text)
            try:
                stay = surviving_groups(layer, view, start, groups, choose)
            except Exception as error:
                if index == 0:
                    raise
                fault, choose = error, _newest
                stay = surviving_groups(layer, view, start, groups, choose)
            layer.shelf.drop(stay)
    pond.evicted += before - pond.memory_tokens
    if fault is not None:
        raise fault


def _grant(pond: Pond, slots: int, since: int, text: int) -> list[int]:
    """Tokens that each layer keeps behind the prompt, `slots` of them in the mean."""
    if pond.arena is None:
        return [slots] * len(pond.layers)
    held = [layer.length - pond.plan.prompt_tokens for layer in pond.layers]
    weights = pond.policy.layer_weights(pond._view(at, layer, since, text) for at, layer in enumerate(pond.layers))
    whole = int(pond._view(0, pond.layers[0], since, text).protected[0].sum())
    most = [min(count, int(pond.policy.layer_share * slots)) for count in held]
    granted = apportion(slots * len(held), weights, [max(1, whole)] * len(held), most)
    assert sum(granted) <= slots * len(held)
    return granted


def _newest(view: View, slots: int, lead: Tensor | None = None) -> Tensor:
    if lead is not None:
        return lead.repeat(view.heads, 1)
    newest = torch.arange(view.tokens, dtype=torch.float32, device=view.keys.device)
    return keep_top(newest.repeat(view.heads, 1), view.protected, slots)


def _checked(pond: Pond, choose: Callable[[View, int], Tensor]) -> Callable[[View, int], Tensor]:
    def checked(view: View, slots: int) -> Tensor:
        keep = choose(view, slots)
        _check(pond, keep, view, slots)
        return keep

    return checked


def _check(pond: Pond, keep: Tensor, view: View, slots: int) -> None:
    """Hold the policy to its contract before a byte moves."""
    name = pond.policy.name
    if keep.shape != (view.heads, slots) or keep.dtype != torch.int64:
        raise PolicyError(
            f"policy {name!r} returned {tuple(keep.shape)} {keep.dtype}, not ({view.heads}, {slots}) int64"
        )
    fault = native.check(keep, view.protected)
    if fault is None:
        fault = _fault(keep, view.protected)
    if fault == 1:
        raise PolicyError(f"policy {name!r} must return ascending token indices below {view.tokens}")
    if fault == 2:
        raise PolicyError(f"policy {name!r} dropped a protected token")


def _check_alike(pond: Pond, keep: Tensor, lead: Tensor | None) -> None:
    """Where frames leave whole, every head and layer must keep the same tokens: those of the first, int64 [S]."""
    if pond.host is not None and not bool((keep == (keep[0] if lead is None else lead)).all()):
        raise PolicyError(
            f"policy {pond.policy.name!r} recalls frames: it must keep the same tokens in every head and layer"
        )


def _fault(keep: Tensor, protected: Tensor) -> int:
    """What the compiled check does, in torch."""
    inside = bool((keep[:, 0] >= 0).all()) and bool((keep[:, -1] < protected.shape[1]).all())
    if not inside or not bool((keep[:, 1:] > keep[:, :-1]).all()):
        return 1
    kept = protected.gather(1, keep).sum(dim=1)
    return 0 if bool((kept == protected.sum(dim=1)).all()) else 2
