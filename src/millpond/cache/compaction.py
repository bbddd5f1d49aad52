"""What a compaction keeps: asks the policy for every layer and holds it to its contract, before anything moves in any of them.

What fails here leaves the memory untouched; moving is the matter of `millpond.cache.moving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from millpond import ops
from millpond.cache.compaction_state import CompactionState
from millpond.cache.moving import Chosen, Compaction, Forgetting
from millpond.cache.recent import Protected
from millpond.errors import BudgetError, PolicyError
from millpond.memory.resumable import Mask, Move
from millpond.policies.allocators.base import apportion
from millpond.policies.base import View
from millpond.policies.scoring.matching import match_scores


def choose_tokens(at: CompactionState, slots: int) -> Move | None:
    """One pass to at most `slots` tokens in full behind the prompt, ready to be carried out; None when no more are there.

    Raises:
        BudgetError: so few that not one can stay. PolicyError: the policy failed or broke its contract.
    """
    tokens, group = at.tokens, at.recent.group_tokens
    if at.policy.needs.whole_frames and group:
        slots -= slots % group
    if slots >= tokens:
        return None
    if slots < 1:
        raise BudgetError(f"the policy {at.policy.name!r} keeps whole frames, and not one fits")
    slots = at.storage.whole(tokens, slots)
    protected = at.protect(slots)
    with at.ledger.borrow("scratch", at.plan.scratch_bytes):
        chosen = _select(at, _grant(at, slots, protected), protected)
        return Compaction(at, chosen, protected, at.plan.slots - at.plan.prompt_tokens - slots)


def choose_groups(at: CompactionState, groups: int) -> Move | None:
    """One pass that leaves at most `groups` quantized groups; None when no more are there. Raises as `choose_tokens`."""
    if at.storage.quantized_groups <= groups:
        return None
    protected = at.protect(at.tokens)
    chosen: list[Chosen | None] = []
    with at.ledger.borrow("scratch", at.plan.scratch_bytes):
        for index in range(len(at.storage.layers)):
            view = at.view(index, protected)
            stay = at.storage.surviving(index, view, at.plan.prompt_tokens, groups, partial(_keep, at))
            chosen.append(None if stay is None else Chosen(None, Mask(stay, at.storage.quantized_groups)))
        return Forgetting(at, chosen)


def _select(at: CompactionState, granted: Sequence[int], protected: Protected) -> list[Chosen | None]:
    """Ask the policy for every layer, from the deepest up where it needs deeper scores; None for a layer that keeps all it has."""
    lead: Tensor | None = None  # what the first layer kept, where all must keep the same
    deeper_scores: Tensor | None = None  # what the policy left at the layer before, for the tokens of the one to come
    layers, storage, start = at.storage.layers, at.storage, at.plan.prompt_tokens
    chosen: list[Chosen | None] = [None] * len(layers)
    order = list(enumerate(zip(layers, granted, strict=True)))
    for index, (layer, share) in reversed(order) if at.policy.needs.deeper_scores else order:
        if share == layer.length - start:
            deeper_scores = None
            continue
        view = at.view(index, protected)
        if at.policy.needs.deeper_scores:
            nothing = torch.full(view.time_us.shape, torch.nan, device=view.keys.device)
            view, deeper_scores = replace(view, deeper_scores=deeper_scores, carried_scores=nothing), None
            del nothing
        keep = _keep(at, view, share)
        stay = storage.surviving(index, view, start, storage.groups_beside(view.tokens - share), partial(_keep, at))
        _check_alike(at, keep, lead)
        if at.host is not None and lead is None:
            lead = keep[0].clone()
        carried = view.carried_scores if index else None
        chosen[index] = Chosen(
            Mask(keep, view.tokens),
            None if stay is None else Mask(stay, storage.quantized_groups),
            view.carried_scores if at.policy.needs.merging else None,
        )
        del view, keep, stay
        if carried is not None:
            deeper_scores = _for_the_next(at, index, carried)
            del carried
    return chosen


def _for_the_next(at: CompactionState, index: int, carried: Tensor) -> Tensor:
    """What a layer that has not moved yet leaves, float32 [H, n], for the tokens of the next shallower one: float32 [H, m]."""
    start = at.plan.prompt_tokens
    tokens = [
        tensor[:, start : layer.length]
        for layer in (at.storage.layers[index], at.storage.layers[index - 1])
        for tensor in (layer.time_us, layer.grid_position)
    ]
    return match_scores(carried, *tokens)


def _grant(at: CompactionState, slots: int, protected: Protected) -> list[int]:
    """Tokens that each layer keeps behind the prompt, `slots` of them on average."""
    layers = at.storage.layers
    if not at.storage.layer_budgets:
        return [slots] * len(layers)
    held = [layer.length - at.plan.prompt_tokens for layer in layers]
    weights = at.policy.layer_weights(at.view(index, protected) for index in range(len(layers)))
    whole = int(at.view(0, protected).protected[0].sum())
    most = [min(count, int(at.policy.needs.layer_share * slots)) for count in held]
    granted = apportion(slots * len(held), weights, [max(1, whole)] * len(held), most)
    assert sum(granted) <= slots * len(held)
    return granted


def _keep(at: CompactionState, view: View, slots: int) -> Tensor:
    """What the policy keeps, held to its contract before a byte moves."""
    keep, name = at.policy.keep(view, slots), at.policy.name
    if keep.shape != (view.heads, slots) or keep.dtype != torch.int64:
        got = f"{tuple(keep.shape)} {keep.dtype}"
        raise PolicyError(f"policy {name!r} returned {got}, not ({view.heads}, {slots}) int64")
    fault = ops.check_selection(keep, view.protected)
    if fault == 1:
        raise PolicyError(f"policy {name!r} must return ascending token indices below {view.tokens}")
    if fault == 2:
        raise PolicyError(f"policy {name!r} dropped a protected token")
    return keep


def _check_alike(at: CompactionState, keep: Tensor, lead: Tensor | None) -> None:
    """Where frames leave whole, every head and layer must keep the same tokens: those of the first, int64 [S]."""
    if at.host is not None and not bool((keep == (keep[0] if lead is None else lead)).all()):
        raise PolicyError(
            f"policy {at.policy.name!r} retrieves frames: it must keep the same tokens in every head and layer"
        )
