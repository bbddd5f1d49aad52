"""What happens in a stream: which object shows where, from which temporal group on and for how long.

A group is two frames, one second. Every object keeps one colour through a stream, no two events begin or end together, and no two
visible objects share a cell. Draws nothing, and knows nothing about questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millpond.eval.streams.digits import digit_indices, digit_value
from millpond.eval.streams.drawing import CELLS, COLOURS, DIGIT, OBJECTS, Level, Sight

_DIGIT_SHARE = 0.7
_LONGEST = 4


@dataclass(frozen=True)
class Event:
    """One object's appearance.

    Attributes:
        kind, colour: indices into OBJECTS and COLOURS (-1: a digit is white).
        image: index of the handwritten digit, or -1.
        offset: of the object from its cell, in pixels (down, right).
        start: first group in which it shows.
        cells: the cell it stands in, one per group that it shows.
    """

    kind: int
    colour: int
    image: int
    offset: tuple[int, int]
    start: int
    cells: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last group in which it shows."""
        return self.start + len(self.cells)

    @property
    def name(self) -> str:
        return OBJECTS[self.kind]

    @property
    def colour_name(self) -> str | None:
        return None if self.colour < 0 else [*COLOURS][self.colour]

    def sight(self, group: int) -> Sight | None:
        """How it shows in that group, or None."""
        if not self.start <= group < self.stop:
            return None
        return Sight(self.kind, self.colour, self.cells[group - self.start], self.image, self.offset)


def plan(rng: np.random.Generator, groups: int, level: Level, split: str) -> tuple[Event, ...]:
    """A time line of `groups` groups, in order of start.

    Fewer than 64 groups hold fewer events; more than 64 hold no more (objects are told apart by kind), so long streams have static
    hours. Half of the streams gather their events in bursts.
    """
    minimum, most = level.events
    most_events = max(2, groups // 2)
    kinds = _kinds(rng, min(int(rng.integers(minimum, most + 1)), most_events, len(OBJECTS)))
    colours = _colours(rng, kinds)
    images = digit_indices(split)
    looks = [
        (kind, colour, int(rng.choice(images)) if kind == DIGIT else -1)
        for kind, colour in zip(kinds, colours, strict=True)
    ]
    order = list(range(len(looks)))
    for index in range(len(looks)):
        while len(order) < most_events and rng.random() < level.repeats:
            order.insert(int(rng.integers(order.index(index) + 1, len(order) + 1)), index)
    # The same object twice in a row would be one appearance with a gap.
    order = [look for at, look in enumerate(order) if at == 0 or order[at - 1] != look]
    longest = max(1, min(_LONGEST, groups // len(order)))
    lengths = rng.integers(1, longest + 1, len(order))
    spare = groups - int(lengths.sum())
    share = rng.dirichlet(np.full(len(order) + 1, 0.3 if rng.random() < 0.5 else 3.0))
    gaps = rng.multinomial(spare, share)
    if rng.random() < 0.4:
        gaps[0], gaps[-1] = gaps[0] + gaps[-1], 0
    events: list[Event] = []
    at = 0
    for look, length, gap in zip(order, lengths, gaps[:-1], strict=True):
        at += int(gap)
        start, stop = at, at + int(length)
        if events and len(events[-1].cells) > 1 and rng.random() < level.overlaps:
            start = max(events[-1].start + 1, start - gap - int(rng.integers(1, len(events[-1].cells))))
        taken = _cells_after(events, start)
        if len(taken) == CELLS:  # something has wandered over the whole frame: wait until it is gone
            start, taken = at, set()
        cells = _walk(rng, stop - start, taken, moves=stop - start > 1 and rng.random() < level.moves)
        offset = (int(rng.integers(-2, 3)), int(rng.integers(-2, 3)))
        events.append(Event(*looks[look], offset, start, cells))
        at = stop
    return tuple(events)


def label_grid(events: Sequence[Event], groups: int) -> NDArray[np.int64]:
    """What shows where: int64 [groups, 16, 3] of kind, colour, digit; -1 for none."""
    grid = np.full((groups, CELLS, 3), -1, dtype=np.int64)
    for event in events:
        digit = digit_value(event.image) if event.kind == DIGIT else -1
        for group, cell in enumerate(event.cells, event.start):
            grid[group, cell] = event.kind, event.colour, digit
    return grid


def _kinds(rng: np.random.Generator, count: int) -> list[int]:
    kinds = [int(kind) for kind in rng.permutation(DIGIT)[:count]]
    if rng.random() < _DIGIT_SHARE:
        kinds[int(rng.integers(len(kinds)))] = DIGIT
    return kinds


def _colours(rng: np.random.Generator, kinds: list[int]) -> list[int]:
    """Each colour once before any is used again."""
    deck = [int(colour) for _ in range(2) for colour in rng.permutation(len(COLOURS))]
    return [-1 if kind == DIGIT else deck[index] for index, kind in enumerate(kinds)]


def _cells_after(events: Sequence[Event], start: int) -> set[int]:
    """Every cell of the events that are not over by then."""
    return {cell for event in events if event.stop > start for cell in event.cells}


def _walk(rng: np.random.Generator, length: int, taken: set[int], *, moves: bool) -> tuple[int, ...]:
    free = [cell for cell in range(CELLS) if cell not in taken]
    cell = int(rng.choice(free))
    cells = [cell]
    for _ in range(length - 1):
        row, col = divmod(cell, 4)
        near = [
            r * 4 + c
            for r, c in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1))
            if 0 <= r < 4 and 0 <= c < 4
        ]
        near = [other for other in near if other not in taken]
        if moves and near:
            cell = int(rng.choice(near))
        cells.append(cell)
    return tuple(cells)
