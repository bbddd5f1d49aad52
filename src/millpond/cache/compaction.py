"""What a compaction keeps: asks the policy for every layer and holds it to its contract, before anything moves in any of them.

What fails here leaves the memory untouched; moving is the matter of `millpond.cache.moving`. Knows the pond it works on; nothing
about budgets beyond the scratch that it borrows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond import ops
from millpond.cache.moving import Chosen, Compaction, Forgetting
from millpond.cache.tier import MixedPrecisionLayer, surviving_groups
from millpond.errors import BudgetError, PolicyError
from millpond.memory.resumable import Mask
from millpond.policies.allocators.base import apportion
from millpond.policies.base import View
from millpond.policies.scoring.matching import carried_scores_of

if TYPE_CHECKING:
    from millpond.cache.layer import PondLayer
    from millpond.cache.pond import Pond

__all__ = ["compact_pond", "forget_quantized"]


def compact_pond(pond: Pond, slots: int) -> None:
    """See `Pond.compact`."""
    pond.finish()
    most = pond.full_precision_tokens - pond.plan.quantized_tokens
    if pond.dequantization_buffer and slots < most:
        _pass(pond, most)  # more than the tier holds at once
    _pass(pond, slots)


def _pass(pond: Pond, slots: int) -> None:
    tokens, plan = pond.full_precision_tokens, pond.plan
    if pond.policy.needs.whole_frames and pond._recent:
        slots -= slots % pond._recent[-1][1]
    if slots >= tokens:
        return
    if slots < 1:
        raise BudgetError(f"the policy {pond.policy.name!r} keeps whole frames, and not one fits")
    if pond.dequantization_buffer:
        group = pond.dequantization_buffer.tier.quantizer.group
        slots = tokens - -(-(tokens - slots) // group) * group
        if slots < 1:
            raise BudgetError(f"tokens are packed {group} at a time, which leaves none of {tokens} in full")
    since, text = pond._protect(slots)
    with pond.ledger.borrow("scratch", plan.scratch_bytes):
        granted = _grant(pond, slots, since, text)
        chosen = _select(pond, granted, since, text)
        # Beside its memory every layer keeps the same room: blocks and turns are equally long in all of them.
        headroom = pond.capacity - slots if pond.arena else 0
        pond.carry_out(Compaction(pond, chosen, [share + headroom for share in granted], since, text))


def _select(pond: Pond, granted: Sequence[int], since: int, text: int) -> list[Chosen | None]:
    """Ask the policy for every layer, from the deepest up where it needs deeper scores; None for a layer that keeps all it has."""
    lead: Tensor | None = None  # what the first layer kept, where all must keep the same
    deeper_scores: Tensor | None = None  # what the policy left at the layer before, for the tokens of the one to come
    chosen: list[Chosen | None] = [None] * len(pond.layers)
    order = list(enumerate(zip(pond.layers, granted, strict=True)))
    for index, (layer, share) in reversed(order) if pond.policy.needs.deeper_scores else order:
        if share == layer.length - pond.plan.prompt_tokens:
            deeper_scores = None
            continue
        view = pond._view(index, layer, since, text)
        if pond.policy.needs.deeper_scores:
            nothing = torch.full(view.time_us.shape, torch.nan, device=pond.device)
            view, deeper_scores = replace(view, deeper_scores=deeper_scores, carried_scores=nothing), None
            del nothing
        keep, stay = _choose(pond, layer, view, share)
        _check_alike(pond, keep, lead)
        if pond.host is not None and lead is None:
            lead = keep[0].clone()
        carried_scores = view.carried_scores if index else None
        chosen[index] = Chosen(
            Mask(keep, view.tokens),
            None if stay is None else Mask(stay, layer.quantized_store.groups),
            view.carried_scores if pond.policy.needs.merging else None,
        )
        del view, keep
        if carried_scores is not None:
            deeper_scores = _hand_on(pond, index, carried_scores)
            del carried_scores
    return chosen


def _hand_on(pond: Pond, index: int, carried_scores: Tensor) -> Tensor:
    """What a layer that has not moved yet leaves, float32 [H, n], for the tokens of the next shallower one: float32 [H, m]."""
    start = pond.plan.prompt_tokens
    tokens = [
        tensor[:, start : layer.length]
        for layer in (pond.layers[index], pond.layers[index - 1])
        for tensor in (layer.time_us, layer.grid_position)
    ]
    return carried_scores_of(carried_scores, *tokens)


def _choose(pond: Pond, layer: PondLayer, view: View, slots: int) -> tuple[Tensor, Tensor | None]:
    """The full tokens that stay, and the packed groups; None for the groups when all of them may."""
    keep = _keep(pond, view, slots)
    if not isinstance(layer, MixedPrecisionLayer):
        return keep, None
    groups = layer.quantized_store.capacity - (view.tokens - slots) // layer.quantized_store.quantizer.group
    if layer.quantized_store.groups <= groups:
        return keep, None
    return keep, surviving_groups(layer, view, pond.plan.prompt_tokens, groups, partial(_keep, pond))


def forget_quantized(pond: Pond, groups: int) -> None:
    """See `Pond.forget_quantized`."""
    pond.finish()
    since, text = pond._protect(pond.full_precision_tokens)
    chosen: list[Chosen | None] = [None] * len(pond.layers)
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        for index, layer in enumerate(pond.layers):
            if isinstance(layer, MixedPrecisionLayer) and layer.quantized_store.groups > groups:
                view = pond._view(index, layer, since, text)
                stay = surviving_groups(layer, view, pond.plan.prompt_tokens, groups, partial(_keep, pond))
                chosen[index] = Chosen(None, Mask(stay, layer.quantized_store.groups))
        pond.carry_out(Forgetting(pond, chosen))


def _grant(pond: Pond, slots: int, since: int, text: int) -> list[int]:
    """Tokens that each layer keeps behind the prompt, `slots` of them on average."""
    if pond.arena is None:
        return [slots] * len(pond.layers)
    held = [layer.length - pond.plan.prompt_tokens for layer in pond.layers]
    weights = pond.policy.layer_weights(pond._view(at, layer, since, text) for at, layer in enumerate(pond.layers))
    whole = int(pond._view(0, pond.layers[0], since, text).protected[0].sum())
    most = [min(count, int(pond.policy.needs.layer_share * slots)) for count in held]
    granted = apportion(slots * len(held), weights, [max(1, whole)] * len(held), most)
    assert sum(granted) <= slots * len(held)
    return granted


def _keep(pond: Pond, view: View, slots: int) -> Tensor:
    """What the policy keeps, held to its contract."""
    keep = pond.policy.keep(view, slots)
    _check(pond, keep, view, slots)
    return keep


def _check(pond: Pond, keep: Tensor, view: View, slots: int) -> None:
    """Hold the policy to its contract before a byte moves."""
    name = pond.policy.name
    if keep.shape != (view.heads, slots) or keep.dtype != torch.int64:
        raise PolicyError(
            f"policy {name!r} returned {tuple(keep.shape)} {keep.dtype}, not ({view.heads}, {slots}) int64"
        )
    fault = ops.check_selection(keep, view.protected)
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
