"""Which packed groups stay: the policy chooses among their tokens, and a group stays for the number of those that it would keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer, stream_order
from millpond.policies.base import View

__all__ = ["surviving_groups"]


def surviving_groups(
    layer: MixedPrecisionLayer, view: View, start: int, groups: int, choose: Callable[[View, int], Tensor]
) -> Tensor:
    """Which packed groups stay, int64 [H, groups] ascending: those with the most tokens that the policy would keep.

    Args:
        view: of the layer's full tokens, whose protected ones the policy is shown beside the packed ones. start: their first slot.
        groups: how many stay, fewer than there are.
        choose: the policy's `keep`.
    """
    quantized, size = layer.quantized_store.tokens, layer.quantized_store.quantizer.group
    if not groups:
        return torch.empty(view.heads, 0, dtype=torch.int64, device=view.keys.device)
    shown, order = _packed_view(layer, view, start)
    keep = choose(shown, groups * size + shown.tokens - quantized)
    del shown
    # Of equals the group that was written later stays.
    live = layer.quantized_store.groups
    later = torch.arange(live, device=view.keys.device)
    votes = torch.empty(view.heads, live, dtype=torch.int64, device=view.keys.device)
    for head, kept in enumerate(keep):
        chosen = order[head, kept]
        votes[head] = (
            torch.bincount(chosen[chosen < quantized].div_(size, rounding_mode="floor"), minlength=live).mul_(live)
            + later
        )
    return votes.topk(groups, dim=1).indices.sort(dim=1).values


def _packed_view(layer: MixedPrecisionLayer, view: View, start: int) -> tuple[View, Tensor]:
    """The packed tokens and the protected full ones on the dequantization buffer in stream order, and where each is stored, int64 [H, n].

    A stored index below the number of packed tokens is one of theirs.
    """
    quantized_store, dequantization_buffer = layer.quantized_store, layer.dequantization_buffer
    quantized, heads, device = quantized_store.tokens, view.heads, view.keys.device
    count = quantized + int(view.protected[0].sum())
    order = torch.empty(heads, count, dtype=torch.int64, device=device)
    time_us = torch.empty_like(order)
    grid_position = torch.empty(heads, count, 2, dtype=torch.int16, device=device)
    accumulated_attention = None if view.accumulated_attention is None else torch.empty(heads, count, device=device)
    keys, values = dequantization_buffer.keys[0, :, :count], dequantization_buffer.values[0, :, :count]
    head_dim, dtype = keys.shape[2], keys.dtype
    for head in range(heads):
        full = view.protected[head].nonzero()[:, 0]
        where = torch.cat([quantized_store.live("grid_position")[head], view.grid_position[head].index_select(0, full)])
        first = layer.positions[head, start : start + view.tokens, 0].index_select(0, full)
        along = stream_order(torch.cat([quantized_store.live("positions")[head, :, 0], first]), where)
        order[head], grid_position[head] = along, where[along]
        time_us[head] = torch.cat([quantized_store.live("time_us")[head], view.time_us[head].index_select(0, full)])[
            along
        ]
        if accumulated_attention is not None and view.accumulated_attention is not None:
            accumulated_attention[head] = torch.cat(
                [
                    quantized_store.live("accumulated_attention")[head],
                    view.accumulated_attention[head].index_select(0, full),
                ]
            )[along]
        rank = torch.empty_like(along).index_copy_(0, along, torch.arange(count, device=device))
        for at in range(0, quantized, dequantization_buffer.step):
            end = min(at + dequantization_buffer.step, quantized)
            rows = torch.empty(end - at, head_dim, dtype=dtype, device=device)
            quantized_store.read(head, at, end, rows, None)
            keys[head].index_copy_(0, rank[at:end], rows)
            quantized_store.read(head, at, end, None, rows)
            values[head].index_copy_(0, rank[at:end], rows)
        for at in range(0, len(full), dequantization_buffer.step):
            part, to = (
                full[at : at + dequantization_buffer.step],
                rank[quantized + at : quantized + at + dequantization_buffer.step],
            )
            keys[head].index_copy_(0, to, view.keys[head].index_select(0, part))
            values[head].index_copy_(0, to, view.values[head].index_select(0, part))
    # The deeper layer's scores are those of its full tokens.
    shown = replace(
        view,
        keys=keys,
        values=values,
        time_us=time_us,
        grid_position=grid_position,
        protected=order >= quantized,
        accumulated_attention=accumulated_attention,
        deeper_scores=None,
        carried_scores=None,
        positions=None,
    )
    return shown, order
