"""How far stored tokens may move together: the integer arithmetic of closing the gaps that evictions leave.

A head's tokens take up pieces of the line of positions. A text token takes the one where it stands. A grid of vision tokens takes, on
its row and column axes, everything from its base to the furthest row or column that is still stored, and stands on the time axis at
one position a group. What lies between those pieces is free; closing moves whole pieces, so that a grid stays a grid and everything
stays in order. Where a grid's base is another's too (all groups of one Qwen2-VL segment count rows and columns from one base) they
move as one piece on those axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from millpond.positions import Clock
from millpond.positions.grid import TEXT


@dataclass(frozen=True)
class Closing:
    """By how much every head of every layer closes its gaps.

    New frames stand at one base and one time in all heads, so all must close the same in front of the open segment's base and the
    same behind it. Within a head the oldest gaps close first, each down to `step`.

    Attributes:
        base: where the open segment's rows and columns begin; the end of the stream where none is open.
        step: what stays between two pieces.
        before, after: positions closed in front of the base and between it and the newest stored token.
        tail: positions closed behind the newest stored token, where frames went by that were not let in.
    """

    base: int
    step: int
    before: int
    after: int
    tail: int

    def leaving(self, wanted: int) -> Closing:
        """The same, with the newest gaps left open that together are `wanted` positions wide, or as many as there are."""
        before = max(0, self.before - max(0, wanted - self.after))
        return replace(self, before=before, after=max(0, self.after - wanted))

    def shifts(self, positions: Tensor, grid_position: Tensor) -> Tensor:
        """How far each token of one head moves back on each axis, int64 [n, axes].

        Args:
            positions: int32 [n, axes], in the order of the stream. grid_position: int16 [n, 2], see `millpond.policies.base`.
        """
        along, across = self._moves(_Head(positions, grid_position))
        shift = torch.empty(positions.shape, dtype=torch.int64, device=positions.device)
        shift[:, 0], shift[:, 1:] = along, across[:, None]
        return shift

    def _moves(self, head: _Head) -> tuple[Tensor, Tensor]:
        """The shifts on the first axis and on the others, int32 [n] each."""
        front, inside = head.gaps(self.step)
        later = head.origin >= self.base
        after = _sums(inside * later).clamp_(max=self.after)
        inside.masked_fill_(later, 0)
        before = _sums(front.add_(inside))
        along = after.add_(before.clamp(max=self.before))
        if head.visual is None:
            return along, along
        # Rows and columns move with their base: by the gaps in front of it, those of its own times left out.
        based = before.sub_(inside).clamp_(max=self.before)[head.first].index_select(0, head.grid)
        return along, torch.where(head.visual, based, along)


def measure(heads: Iterable[tuple[Tensor, Tensor]], clock: Clock) -> Closing:
    """The most that all heads can close alike.

    Args:
        heads: positions and grid positions of each, as in `Closing.shifts`.
    """
    base = clock.base if clock.base is not None else clock.next
    before = after = tail = clock.next
    for positions, grid_position in heads:
        head = _Head(positions, grid_position)
        front, inside = head.gaps(clock.step)
        above = int((inside * (head.origin >= base)).sum())
        below, last = int(front.sum()) + int(inside.sum()) - above, int(head.reach[-1])
        if clock.base is not None and last < base:
            # Nothing of the open segment is stored: its base counts as taken all the same, because new frames are placed by it.
            below += max(0, base - last - clock.step)
            last = base
        before, after = min(before, below), min(after, above)
        tail = min(tail, max(0, clock.next - last - clock.step))
    return Closing(base, clock.step, before, after, tail)


class _Head:
    """One head's tokens as pieces of the line of positions; int32 [n] where nothing else is said.

    Attributes:
        visual: bool [n], on a grid; None where there is one axis and therefore no grid.
        origin: where the token's piece begins: its grid's base, or the token itself.
        grid: number of the token's piece. first: [pieces], a piece's first token.
        reach: the largest position that the pieces up to each token take: where text after it would have gone on.
    """

    def __init__(self, positions: Tensor, grid_position: Tensor) -> None:
        self._time = self._top = self.origin = self.reach = positions[:, 0]
        self.visual: Tensor | None = None
        if positions.shape[1] == 1:
            return
        self.visual = grid_position[:, 0] > TEXT
        self.origin = torch.where(self.visual, positions[:, 1] - grid_position[:, 0], self._time)
        begins = torch.ones_like(self.visual)
        torch.ne(self.origin[1:], self.origin[:-1], out=begins[1:])
        self.first = begins.nonzero()[:, 0]
        self.grid = _sums(begins).sub_(1)
        del begins
        # The furthest row or column of each piece: whatever follows it stands behind that.
        furthest = positions[:, 1:].amax(dim=1)
        top = furthest[self.first].scatter_reduce_(0, self.grid.long(), furthest, "amax")
        self._top = top.index_select(0, self.grid)
        self.reach = torch.maximum(self._time, self._top)

    def gaps(self, step: int) -> tuple[Tensor, Tensor]:
        """Closable positions in front of each token's piece, and within it in front of its time; int32 [n] each."""
        previous = torch.cat([self.reach.new_full((1,), -1), self.reach[:-1]])
        front = (self.origin - previous).sub_(step).clamp_(min=0)
        inside = torch.maximum(previous, self._top, out=previous)
        return front, torch.sub(self._time, inside, out=inside).sub_(step).clamp_(min=0)


def _sums(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)
