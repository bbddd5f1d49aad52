"""Turning stored keys to new rotary positions, so that a stream can run past the range that the weights were trained on.

Positions are stored per token and head as integers, and each re-anchoring turns a key once, by the exact integer
difference, in float32: nothing accumulates but one rounding per re-anchoring, and those are rare (once per trained range).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from millpond.cache.layer import PondLayer
from millpond.cache.pond import Pond
from millpond.gaps import measure
from millpond.positions import Clock, Rope

__all__ = ["close_gaps", "shift_uniformly"]


def shift_uniformly(pond: Pond, rope: Rope, clock: Clock, by: int) -> None:
    """Move every stored token, the prompt included, and the clock back by `by` positions on every axis.

    Only differences of positions enter attention, so the logits stay what they were; what it buys is that position
    numbers stay small enough for float32.
    """
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        for layer in pond.layers:
            for head in range(layer.positions.shape[0]):
                back = torch.full((1, rope_axes(layer)), -by, dtype=torch.int64, device=layer.device)
                layer.turn(head, rope, back.expand(layer.get_seq_length(), -1), pond.plan.chunk)
        pond.queries.turn(rope, torch.full((pond.geometry.axes,), -by), pond.plan.chunk)
    if pond.host is not None:
        pond.host.move(by, by)
    clock.shift(spatial=by, temporal=by)


def close_gaps(pond: Pond, rope: Rope, clock: Clock) -> int:
    """Close the gaps that evictions left, so that the memory spans no more positions than its tokens need.

    Each head keeps different tokens, so each has gaps of its own; all close equally many, the least that any head can (see
    `millpond.gaps`). Order and grids stay. Where a question recalls frames from host memory, a gap as wide as they need stays open in
    front of the window.

    Returns:
        By how many positions the end of the stream moved back.
    """
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        closing = measure(_heads(pond), clock)
        if pond.host is not None:
            closing = closing.leaving(pond.plan.recall_frames * (pond.host.span + clock.step))
        before, along = closing.before, closing.before + closing.after
        if along:
            for layer in pond.layers:
                for head in range(layer.positions.shape[0]):
                    shift = closing.shifts(*layer.in_order(head))
                    layer.turn(head, rope, shift.neg_(), pond.plan.chunk)
            # The proxy's tokens stand at the end of the stream, behind every gap, and move with its newest token.
            moved = torch.full((pond.geometry.axes,), along)
            if clock.base is not None:
                moved[1:] = before
            pond.queries.turn(rope, -moved, pond.plan.chunk)
    if pond.host is not None:
        pond.host.move(before, along)
    clock.shift(spatial=before, temporal=along + closing.tail)
    return along + closing.tail


def _heads(pond: Pond) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions and places of every head of every layer, in the order of the stream."""
    for layer in pond.layers:
        for head in range(layer.positions.shape[0]):
            yield layer.in_order(head)


def rope_axes(layer: PondLayer) -> int:
    """Rotary axes of the layer's stored positions."""
    return layer.positions.shape[2]
