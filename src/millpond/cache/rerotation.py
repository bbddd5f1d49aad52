"""Rerotating stored keys to new rotary positions, so that a stream can run past the range that the weights were trained on.

Positions are stored per token and head as integers, and each re-anchoring rotates a key once, by the exact integer
difference, in float32: nothing accumulates but one rounding per re-anchoring, and those are rare (once per trained range).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from millpond.cache.pond import Pond
from millpond.cache.storage.layer import PondLayer
from millpond.memory.resumable import Step, Steps
from millpond.positions import Clock, Rope
from millpond.positions.gaps import measure


def stay_in_range(pond: Pond, rope: Rope, clock: Clock, tokens: int, *, closing: bool) -> int:
    """Re-anchor when the next `tokens` tokens would pass the positions that the weights were trained on.

    Args:
        closing: whether gaps close first; what is still too far then is shifted uniformly.

    Returns:
        By how many positions the end of the stream moved back.
    """
    if not leaves_range(rope, clock, tokens) or pond.length == 0:
        return 0
    moved = close_gaps(pond, rope, clock) if closing else 0
    if clock.next + _counted(rope, tokens) > rope.limit * 3 // 4:
        # Nothing (more) to close: true distances stay, the numbers move into the first half of the range.
        by = clock.next - rope.limit // 2
        if by > 0:
            shift_uniformly(pond, rope, clock, by)
            moved += by
    return moved


def leaves_range(rope: Rope, clock: Clock, tokens: int) -> bool:
    """Whether the next `tokens` tokens would pass the positions that the weights were trained on."""
    return clock.next + _counted(rope, tokens) > rope.limit


def _counted(rope: Rope, tokens: int) -> int:
    # At most a quarter: tokens of one frame share positions, and a turn that counts them all would re-anchor every block.
    return min(tokens, rope.limit // 4)


def shift_uniformly(pond: Pond, rope: Rope, clock: Clock, by: int) -> None:
    """Move every stored token, the prompt included, and the clock back by `by` positions on every axis.

    Only differences of positions enter attention, so the logits stay what they were; what it buys is that position
    numbers stay small enough for float32.
    """
    pond.finish()

    def shifts(layer: PondLayer, head: int) -> Tensor:
        return torch.full((layer.get_seq_length(), pond.geometry.axes), by, dtype=torch.int64, device=layer.device)

    end = replace(clock)
    end.shift(spatial=by, temporal=by)
    pond.carry_out(_Reanchoring(pond, rope, shifts, by, by, clock, end))


def close_gaps(pond: Pond, rope: Rope, clock: Clock) -> int:
    """Close the gaps that evictions left, so that the memory spans no more positions than its tokens need.

    Each head keeps different tokens, so each has gaps of its own; all close equally many, the minimum over what each head can (see
    `millpond.positions.gaps`). Order and grids stay. Where a question retrieves frames from host memory, a gap as wide as they need stays open in
    front of the window.

    Returns:
        By how many positions the end of the stream moved back.
    """
    pond.finish()
    with pond.ledger.borrow("scratch", pond.plan.scratch_bytes):
        closing = measure(_heads(pond), clock)
    if pond.host is not None:
        closing = closing.leaving(pond.plan.retrieved_frames * (pond.host.span + clock.step))
    before, along = closing.before, closing.before + closing.after
    end = replace(clock)
    end.shift(spatial=before, temporal=along + closing.tail)
    if along:

        def shifts(layer: PondLayer, head: int) -> Tensor:
            return closing.shifts(*layer.in_order(head))

        pond.carry_out(_Reanchoring(pond, rope, shifts, before, along, clock, end))
    else:
        vars(clock).update(vars(end))
    return along + closing.tail


def _heads(pond: Pond) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions and grid positions of every head of every layer, in the order of the stream."""
    for layer in pond.layers:
        for head in range(layer.positions.shape[0]):
            yield layer.in_order(head)


_Shifts = Callable[[PondLayer, int], Tensor]


class _Reanchoring:
    """Rerotates every stored key, head by head, then the proxy's queries, what host memory knows, and the clock. A `Move`.

    Args:
        shifts: by how much the tokens of a layer's head move back, int64 [n, axes] in the order of the stream. Asked when its
            steps begin: it may look at nothing that those of other heads change.
        spatial, temporal: by how much the stream's newest token does, on the grid's axes and on the first.
        clock, end: the stream's clock, and what it is afterwards.
    """

    def __init__(
        self, pond: Pond, rope: Rope, shifts: _Shifts, spatial: int, temporal: int, clock: Clock, end: Clock
    ) -> None:
        self._pond, self._rope, self._shifts = pond, rope, shifts
        # The proxy's tokens stand at the end of the stream, behind every gap, and move with its newest token.
        by = torch.full((pond.geometry.axes,), -temporal)
        if clock.base is not None:
            by[1:] = -spatial
        heads = [(layer, head) for layer in pond.layers for head in range(layer.positions.shape[0])]
        rest = pond.queries.rerotation(rope, by, pond.plan.chunk)
        if pond.host is not None:
            rest.append(partial(pond.host.move, pond.host.moved(spatial, temporal)))
        rest.append(partial(vars(clock).update, vars(end)))
        self._steps = Steps([*(Steps(partial(self._rerotation, *each)).run for each in heads), *rest])

    def run(self) -> None:
        with self._pond.ledger.borrow("scratch", self._pond.plan.scratch_bytes):
            self._steps.run()

    def _rerotation(self, layer: PondLayer, head: int) -> list[Step]:
        by = self._shifts(layer, head).neg_()
        steps: list[Step] = layer.rerotation(head, self._rope, by, self._pond.plan.chunk)
        return steps
