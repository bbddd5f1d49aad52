"""Turning stored keys to new rotary positions, so that a stream can run past the range that the weights were trained on.

Positions are stored per token and head as integers, and each re-anchoring turns a key once, by the exact integer
difference, in float32: nothing accumulates but one rounding per re-anchoring, and those are rare (once per trained range).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from millpond.cache.layer import PondLayer
from millpond.cache.pond import Pond
from millpond.policies.base import TEXT
from millpond.positions import Clock, Rope
from millpond.resumable import Lazy, Steps

__all__ = ["close_gaps", "shift_uniformly"]


def shift_uniformly(pond: Pond, rope: Rope, clock: Clock, by: int) -> None:
    """Move every stored token, the prompt included, and the clock back by `by` positions on every axis.

    Only differences of positions enter attention, so the logits stay what they were; what it buys is that position
    numbers stay small enough for float32.
    """
    pond.finish()

    def shifts(layer: PondLayer, head: int) -> Tensor:
        return torch.full((layer.get_seq_length(), rope_axes(layer)), by, dtype=torch.int64, device=layer.device)

    end = replace(clock)
    end.shift(spatial=by, temporal=by)
    pond.carry_out(_Reanchoring(pond, rope, shifts, by, by, clock, end))


def close_gaps(pond: Pond, rope: Rope, clock: Clock) -> int:
    """Close the gaps that evictions left, so that the memory spans no more positions than its tokens need.

    Each head keeps different tokens, so each has gaps of its own. All heads must agree on where the stream goes on, so
    every head closes the same total before the open segment's base and the same after it: the least that any head
    can close there. Within a head the oldest gaps close first, down to the clock's native step; order and grids stay.
    Where a question recalls frames from host memory, a gap as wide as they need stays open in front of the window.

    Returns:
        By how many positions the end of the stream moved back.
    """
    base = clock.base if clock.base is not None else clock.next
    pond.finish()
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        before, after = _closable(pond, clock, base)
    if pond.host is not None:
        wanted = pond.plan.recall_frames * (pond.host.span + clock.step)
        before = max(0, before - max(0, wanted - after))
        after = max(0, after - wanted)
    if before + after:
        then, end = replace(clock), replace(clock)  # what is left to turn goes by what the clock was
        end.shift(spatial=before, temporal=before + after)
        shifts = partial(_shifts, clock=then, base=base, before=before, after=after)
        pond.carry_out(_Reanchoring(pond, rope, shifts, before, before + after, clock, end))
    return before + after


class _Reanchoring:
    """Turns every stored key back, head by head, then the proxy's queries, what host memory knows, and the clock. A `Move`.

    Args:
        shifts: by how much the tokens of a layer's head move back, int64 [n, axes] in the order of the stream. Asked when the head's
            turn comes: it may look at nothing that other heads' turning changes.
        spatial, temporal: by how much the stream's newest token does, on the grid's axes and on the first.
        clock, end: the stream's clock, and what it is afterwards.
    """

    def __init__(
        self,
        pond: Pond,
        rope: Rope,
        shifts: Callable[[PondLayer, int], Tensor],
        spatial: int,
        temporal: int,
        clock: Clock,
        end: Clock,
    ) -> None:
        self._pond, self._rope, self._shifts = pond, rope, shifts
        # The proxy's tokens stand at the end of the stream, behind every gap, and move with the clock.
        by = torch.full((pond.geometry.axes,), -temporal)
        if clock.base is not None:
            by[1:] = -spatial
        heads = [(layer, head) for layer in pond.layers for head in range(layer.positions.shape[0])]
        rest = pond.queries.turning(rope, by, pond.plan.chunk)
        if pond.host is not None:
            rest.append(partial(pond.host.move, pond.host.moved(spatial, temporal)))
        rest.append(partial(vars(clock).update, vars(end)))
        self._steps = Steps([*(Lazy(partial(self._turning, *each)).run for each in heads), *rest])

    def run(self) -> None:
        with self._pond.ledger.borrow("scratch", self._pond.plan.scratch_bytes):
            self._steps.run()

    def _turning(self, layer: PondLayer, head: int) -> list[Callable[[], None]]:
        by = self._shifts(layer, head).neg_()
        turning: list[Callable[[], None]] = layer.turning(head, self._rope, by, self._pond.plan.chunk)
        return turning


def rope_axes(layer: PondLayer) -> int:
    """Rotary axes of the layer's stored positions."""
    return layer.positions.shape[2]


def _extent(layer: PondLayer, head: int) -> Tensor:
    """int64 [n], the largest position on any axis up to each token: where text after it would have gone on."""
    return layer.in_order(head)[0].amax(dim=1).to(torch.int64).cummax(0).values


def _gaps(extent: Tensor, clock: Clock, base: int) -> tuple[Tensor, Tensor]:
    """Closable positions in front of each token, int64 [n] each: below the open segment's base, and above it.

    The base itself counts as taken in every head, because new frames are placed by it.
    """
    previous = torch.cat([extent.new_full((1,), -1), extent[:-1]])
    below = extent.clamp(max=base) - previous.clamp(max=base) - clock.step
    above = extent.clamp(min=base) - previous.clamp(min=base) - clock.step
    return below.clamp_(min=0), above.clamp_(min=0)


def _closable(pond: Pond, clock: Clock, base: int) -> tuple[int, int]:
    before = after = clock.next
    for layer in pond.layers:
        for head in range(layer.positions.shape[0]):
            below, above = _gaps(_extent(layer, head), clock, base)
            before, after = min(before, int(below.sum())), min(after, int(above.sum()))
    return before, after


def _shifts(layer: PondLayer, head: int, clock: Clock, base: int, before: int, after: int) -> Tensor:
    """int64 [n, axes], how far each token of a head moves back on each axis."""
    extent = _extent(layer, head)
    below, above = _gaps(extent, clock, base)
    along = below.cumsum(0).clamp_(max=before) + above.cumsum(0).clamp_(max=after)
    axes = rope_axes(layer)
    shift = along[:, None].expand(-1, axes).clone()
    if axes == 3:
        # A vision token's height and width count from the base of its segment, which moved with the text before it.
        positions, place = layer.in_order(head)
        visual = place[:, 0] > TEXT
        origin = positions[:, 1].to(torch.int64) - place[:, 0]
        at = torch.searchsorted(extent, origin, right=True) - 1
        anchored = torch.where(at < 0, 0, along[at.clamp(min=0)])
        anchored = torch.where(origin >= base, before, anchored)
        shift[visual, 1:] = anchored[visual, None]
    return shift
