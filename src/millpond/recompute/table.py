"""The mixed optimum: a table of minimum forward counts F(t, m, s) for storing hidden and internal states together.

With h and a what a hidden and an internal state cost, in units of memory, F(t, m, s) = t for t <= 1, else the minimum of

    t (t + 1) / 2                                             sweep again for every step
    m >= h:           min_y  y + F(t-y, m-h, 1) + F(y, m, s)     store a hidden state behind step y
    m >= a:           min_y  y + F(t-y, m-a, 0) + F(y-1, m, s)   keep the internal state of step y
    s = 1, m+h >= a:         1 + F(t-1, m+h-a, 0)                swap the start state for step 1's internal state

s = 1 says that the segment's start state occupies memory which may be given back. Without the last line this is the
MSM of Gruslys et al. (NIPS 2016, eq. 5) at h = 1, which is one forward worse in some cases.

Units may be bytes. With the start state's memory counted in, that is m + s h, what the memory is good for changes only
at the sums i h + j a; a table has one row for each of these *levels*, and none between them. Knows units; nothing about
tensors. One table serves every shorter length and every smaller budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Counts: TypeAlias = npt.NDArray[np.int32]
Levels: TypeAlias = npt.NDArray[np.int64]
Move: TypeAlias = Literal["sweep", "hidden", "internal", "swap"]

# Above any count in a table of at most MOST_STEPS steps, and small enough that two of them and a length fit into int32.
_NEVER = 2**29
MOST_STEPS = 20_000
# Entry-candidates t^2 times levels that the exact search may visit: about six seconds on one core (docs/recompute/theory.md).
_EXACT_WORK = 1.1e9
# Entries t times levels that the windowed search may fill: about five seconds on one core.
_WINDOWED_WORK = 5e6
# The windowed search tries this many splits on either side of the best split for one step less.
_WINDOW = 16
# Sizes are rounded up so that sequences of slightly different lengths share a table.
_STEP_GRAIN, _SLOT_GRAIN = 64, 16


def fits_exactly(t: int, m: int, hidden_units: int, internal_units: int) -> bool:
    """Whether the exact search may be run for t steps and m units."""
    steps, slots = _rounded(t, m, hidden_units)
    return t <= MOST_STEPS and steps**2 * _count_levels(steps, slots, hidden_units, internal_units) <= _EXACT_WORK


def _rounded(t: int, m: int, hidden_units: int) -> tuple[int, int]:
    """Steps and units of a table for t and m: whole grains, a grain of memory being that many hidden states."""
    grain = _SLOT_GRAIN * hidden_units
    return -(-t // _STEP_GRAIN) * _STEP_GRAIN, -(-m // grain) * grain


@dataclass(frozen=True, eq=False)
class Table:
    """F(t, m, s) for t <= steps and m <= slots.

    Attributes:
        counts: int32 [2, levels, steps + 1], indexed [s, level of m + s h, t].
        levels: int64, ascending from 0: the amounts of memory, in units, at which the counts may change.
        slots: the largest memory that the table is for, in units; at least the last level.
        hidden_units, internal_units: what a stored state costs, in units of memory.
        exact: every split was tried; otherwise only those near the best split for one step less, which gives a valid
            plan but not always the optimum.
    """

    counts: Counts
    levels: Levels
    slots: int
    hidden_units: int
    internal_units: int
    exact: bool

    @property
    def steps(self) -> int:
        """The longest segment in the table."""
        return int(self.counts.shape[2]) - 1

    def forwards(self, t: int, m: int, s: int = 0) -> int:
        """F(t, m, s); memory beyond the table's is not counted on."""
        return int(self._counts(m, s)[t])

    def split(self, t: int, m: int, s: int) -> tuple[Move, int]:
        """The best first move for a segment of t >= 2 steps, and its y."""
        h, a = self.hidden_units, self.internal_units
        best = t * (t + 1) // 2
        move: tuple[Move, int] = ("sweep", 0)
        y, left = np.arange(1, t), self._counts(m, s)
        if m >= h:
            costs = y + self._counts(m - h, 1)[t - 1 : 0 : -1] + left[1:t]
            at = int(costs.argmin())
            if costs[at] < best:
                best, move = int(costs[at]), ("hidden", at + 1)
        if m >= a:
            costs = y + self._counts(m - a, 0)[t - 1 : 0 : -1] + left[: t - 1]
            at = int(costs.argmin())
            if costs[at] < best:
                best, move = int(costs[at]), ("internal", at + 1)
        if s and m + h >= a and 1 + self.forwards(t - 1, m + h - a) < best:
            move = ("swap", 1)
        return move

    def _counts(self, m: int, s: int) -> Counts:
        row = int(self.levels.searchsorted(m + s * self.hidden_units, side="right")) - 1
        counts: Counts = self.counts[s, row]
        return counts


def mixed_table(t: int, m: int, hidden_units: int, internal_units: int) -> Table | None:
    """A table that holds (t, m), from the cache where one does; None if t is beyond `MOST_STEPS`.

    The search is exact where t^2 times the levels is at most 1.1e9 (T = 1000 with 1000), windowed up to t m = 5e6
    (T = 10,000 with 500 units); beyond that the table stops at the largest memory that fits, and counts no memory above
    it.
    """
    if t > MOST_STEPS:
        return None
    exact = fits_exactly(t, m, hidden_units, internal_units)
    if not exact:
        m = min(m, int(_WINDOWED_WORK / t))
    for held in _held.get((hidden_units, internal_units), []):
        if held.steps >= t and held.slots >= m and held.exact >= exact:
            return held
    steps, slots = _rounded(t, m, hidden_units)
    table = build_table(steps, slots, hidden_units, internal_units, window=None if exact else _WINDOW)
    _hold(table)
    return table


# The tables built so far, by the cost of a hidden and an internal state; a table covered by a later one is dropped.
_held: dict[tuple[int, int], list[Table]] = {}
_HELD_BYTES = 256 * 1024**2


def _hold(table: Table) -> None:
    """Keep a table for later calls, within `_HELD_BYTES` (the oldest costs are forgotten first)."""
    key = (table.hidden_units, table.internal_units)
    others = [
        old
        for old in _held.pop(key, [])
        if not (table.steps >= old.steps and table.slots >= old.slots and table.exact >= old.exact)
    ]
    _held[key] = [table, *others]
    while len(_held) > 1 and sum(t.counts.nbytes for tables in _held.values() for t in tables) > _HELD_BYTES:
        del _held[next(iter(_held))]


def build_table(steps: int, slots: int, hidden_units: int, internal_units: int, window: int | None) -> Table:
    """Fill a table; `window` limits the splits tried to that many on either side of the last best one."""
    levels = _levels(steps, slots, hidden_units, internal_units)
    pad = window or 0
    padded = np.full((2, len(levels), steps + 1 + 2 * pad), _NEVER, np.int32)
    counts = padded[:, :, pad : pad + steps + 1]
    counts[:, :, 0] = 0
    if steps >= 1:
        counts[:, :, 1] = 1
    moves = _Moves.on(levels, hidden_units, internal_units)
    if window is None:
        _fill_exact(counts, moves)
    else:
        _fill_windowed(padded, counts, window, moves)
    return Table(counts, levels, slots, hidden_units, internal_units, exact=window is None)


@dataclass(frozen=True, eq=False)
class _Split:
    """A way to begin a segment, for all levels that can pay for it: the last rows of the table.

    The left part stays on the row, `back` steps shorter than y. The right part has start state `start`, and row `right`.
    """

    start: int
    right: Levels
    back: int


@dataclass(frozen=True, eq=False)
class _Moves:
    """The splits open to segments with s = 0 and s = 1, and the row left after a swap."""

    splits: tuple[tuple[_Split, _Split], tuple[_Split, _Split]]
    swap: Levels

    @classmethod
    def on(cls, levels: Levels, h: int, a: int) -> _Moves:
        """A stored hidden state becomes the start state of the right part, so its memory stays counted there."""

        def left(cost: int, first: int) -> Levels:
            return levels.searchsorted(levels[levels.searchsorted(first) :] - cost, side="right") - 1

        without = _Split(1, left(0, h), 0), _Split(0, left(a, a), 1)
        with_start = _Split(1, left(h, 2 * h), 0), _Split(0, left(h + a, h + a), 1)
        return cls((without, with_start), left(a, a))


def _levels(steps: int, slots: int, h: int, a: int) -> Levels:
    """All sums i h + j a <= slots of at most `steps` states, or every number of units where these are not more."""
    most = _most_hidden(steps, slots, h, a)
    if slots + 1 <= int((most + 1).sum()):
        return np.arange(slots + 1, dtype=np.int64)
    sums = [j * a + h * np.arange(count + 1, dtype=np.int64) for j, count in enumerate(most.tolist())]
    return np.unique(np.concatenate(sums))


def _count_levels(steps: int, slots: int, h: int, a: int) -> int:
    """An upper bound of the number of levels."""
    return min(slots + 1, int((_most_hidden(steps, slots, h, a) + 1).sum()))


def _most_hidden(steps: int, slots: int, h: int, a: int) -> Levels:
    """The most hidden states beside j = 0, 1, ... internal ones, of at most `steps` stored states."""
    kept = np.arange(min(slots // a, steps) + 1, dtype=np.int64)
    return np.minimum((slots - kept * a) // h, steps - kept)


def _fill_exact(counts: Counts, moves: _Moves) -> None:
    """Every split of every entry, one length at a time: shorter lengths are all that an entry needs."""
    rows, steps = counts.shape[1], counts.shape[2] - 1
    # counts + y, kept beside the counts: one addition less per candidate.
    shifted = counts + np.arange(steps + 1, dtype=np.int32)
    # What the right parts cost, by falling length: both parts are then read in rising order of y.
    right = [[(split, np.ones((len(split.right), steps), np.int32)) for split in splits] for splits in moves.splits]
    scratch = np.empty(rows * steps, np.int32)
    for t in range(2, steps + 1):
        for s in (0, 1):
            best = np.full(rows, t * (t + 1) // 2, np.int32)
            for split, beyond in right[s]:
                if not len(beyond):
                    continue
                first = rows - len(beyond)
                costs = scratch[: len(beyond) * (t - 1)].reshape(len(beyond), t - 1)
                np.add(shifted[s, first:, 1 - split.back : t - split.back], beyond[:, steps - t + 1 :], out=costs)
                # `shifted` counts y - back steps for running to y.
                np.minimum(best[first:], costs.min(axis=1) + split.back, out=best[first:])
            if s:
                _swap(best, counts, t, moves.swap)
            counts[s, :, t] = best
            shifted[s, :, t] = best + t
        for split, beyond in (*right[0], *right[1]):
            beyond[:, steps - t] = counts[split.start, split.right, t]


def _fill_windowed(padded: Counts, counts: Counts, w: int, moves: _Moves) -> None:
    """Only splits within w of the best one for t - 1. Entries not yet filled are `_NEVER`, so they never win."""
    rows, steps = counts.shape[1], counts.shape[2] - 1
    # windows[s, row, i] = counts[s, row, i - w : i + w + 1], contiguous, so that a gather copies whole rows.
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * w + 1, axis=2)
    offsets = np.arange(-w, w + 1, dtype=np.int32)
    last = [[(split, np.ones(len(split.right), np.int64)) for split in splits] for splits in moves.splits]
    for t in range(2, steps + 1):
        for s in (0, 1):
            best = np.full(rows, min(t * (t + 1) // 2, _NEVER), np.int32)
            for split, at in last[s]:
                if not len(at):
                    continue
                first = rows - len(at)
                costs = windows[s, np.arange(first, rows), at - split.back]
                costs += windows[split.start, split.right, t - at][:, ::-1]
                costs += offsets
                move = costs.argmin(axis=1)
                found = costs[np.arange(len(at)), move] + at
                np.minimum(best[first:], found, out=best[first:], casting="unsafe")
                at += move - w
                np.clip(at, 1, t - 1, out=at)
            if s:
                _swap(best, counts, t, moves.swap)
            counts[s, :, t] = best


def _swap(best: Counts, counts: Counts, t: int, left: Levels) -> None:
    """The last line of the recurrence, for all rows at once."""
    first = len(best) - len(left)
    np.minimum(best[first:], counts[0, left, t - 1] + 1, out=best[first:])
