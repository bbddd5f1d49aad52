"""The mixed optimum: a table of least forward counts F(t, m, s) for storing hidden and internal states together.

With costs h and a in units of memory for a hidden and an internal state, F(t, m, s) = t for t <= 1, else the least of

    t (t + 1) / 2                                             sweep again for every step
    m >= h:           min_y  y + F(t-y, m-h, 1) + F(y, m, s)     store a hidden state behind step y
    m >= a:           min_y  y + F(t-y, m-a, 0) + F(y-1, m, s)   keep the internal state of step y
    s = 1, m+h >= a:         1 + F(t-1, m+h-a, 0)                swap the start state for step 1's internal state

s = 1 says that the segment's start state occupies memory which may be given back. Without the last line this is the
MSM of Gruslys et al. (NIPS 2016, eq. 5) at h = 1, which is one forward worse in some cases.

Knows units, not bytes; nothing about tensors. One table serves every shorter length and every smaller budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["EXACT_WORK", "MOST_STEPS", "Move", "Table", "build_table", "mixed_table"]

Counts: TypeAlias = npt.NDArray[np.int32]
Move: TypeAlias = Literal["sweep", "hidden", "internal", "swap"]

# Above any count in a table of at most MOST_STEPS steps, and small enough that two of them and a length fit into int32.
_NEVER = 2**29
MOST_STEPS = 20_000
# Entry-candidates t^2 m that the exact search may visit: about two seconds on one core.
EXACT_WORK = 1e9
# Entries t m that the windowed search may fill: about five seconds on one core.
_WINDOWED_WORK = 5e6
# The windowed search tries this many splits on either side of the best split for one step less.
_WINDOW = 16
# Sizes are rounded up so that sequences of slightly different lengths share a table.
_STEP_GRAIN, _SLOT_GRAIN = 64, 16


@dataclass(frozen=True, eq=False)
class Table:
    """F(t, m, s) for t <= steps and m <= slots.

    Attributes:
        counts: int32 [2, slots + 1, steps + 1], indexed [s, m, t].
        hidden_units, internal_units: what a stored state costs, in units of memory.
        exact: every split was tried; otherwise only those near the best split for one step less, which gives a valid
            plan but not always the optimum.
    """

    counts: Counts
    hidden_units: int
    internal_units: int
    exact: bool

    @property
    def steps(self) -> int:
        """The longest segment in the table."""
        return int(self.counts.shape[2]) - 1

    @property
    def slots(self) -> int:
        """The largest memory in the table, in units."""
        return int(self.counts.shape[1]) - 1

    def forwards(self, t: int, m: int, s: int = 0) -> int:
        """F(t, m, s); memory beyond the table's is not counted on."""
        return int(self.counts[s, min(m, self.slots), t])

    def split(self, t: int, m: int, s: int) -> tuple[Move, int]:
        """The best first move for a segment of t >= 2 steps, and its y."""
        m = min(m, self.slots)
        h, a = self.hidden_units, self.internal_units
        best = t * (t + 1) // 2
        move: tuple[Move, int] = ("sweep", 0)
        y = np.arange(1, t)
        if m >= h:
            costs = y + self.counts[1, m - h, t - 1 : 0 : -1] + self.counts[s, m, 1:t]
            at = int(costs.argmin())
            if costs[at] < best:
                best, move = int(costs[at]), ("hidden", at + 1)
        if m >= a:
            costs = y + self.counts[0, m - a, t - 1 : 0 : -1] + self.counts[s, m, : t - 1]
            at = int(costs.argmin())
            if costs[at] < best:
                best, move = int(costs[at]), ("internal", at + 1)
        if s and m + h >= a and 1 + self.forwards(t - 1, m + h - a) < best:
            move = ("swap", 1)
        return move


def mixed_table(t: int, m: int, hidden_units: int, internal_units: int) -> Table | None:
    """A table that holds (t, m), from the cache where one does; None if t is beyond `MOST_STEPS`.

    The search is exact where t^2 m <= 1e9 (T = 1000 with 1000 units), windowed up to t m = 5e6 (T = 10,000 with 500
    units); beyond that the table stops at the largest memory that fits, and counts no memory above it.
    """
    if t > MOST_STEPS:
        return None
    exact = t * t * m <= EXACT_WORK
    if not exact:
        m = min(m, int(_WINDOWED_WORK / t))
    steps = -(-t // _STEP_GRAIN) * _STEP_GRAIN
    slots = -(-m // _SLOT_GRAIN) * _SLOT_GRAIN
    for held in _held.get((hidden_units, internal_units), []):
        if held.steps >= t and held.slots >= m and held.exact >= exact:
            return held
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
    pad = window or 0
    padded = np.full((2, slots + 1, steps + 1 + 2 * pad), _NEVER, np.int32)
    counts = padded[:, :, pad : pad + steps + 1]
    counts[:, :, 0] = 0
    if steps >= 1:
        counts[:, :, 1] = 1
    if window is None:
        _fill_exact(counts, hidden_units, internal_units)
    else:
        _fill_windowed(padded, counts, window, hidden_units, internal_units)
    return Table(counts, hidden_units, internal_units, exact=window is None)


def _fill_exact(counts: Counts, h: int, a: int) -> None:
    """Every split of every entry, one length at a time: shorter lengths are all that an entry needs."""
    slots, steps = counts.shape[1] - 1, counts.shape[2] - 1
    # counts + y, kept beside the counts: one addition less per candidate.
    shifted = counts + np.arange(steps + 1, dtype=np.int32)
    scratch = np.empty((slots + 1) * steps, np.int32)
    for t in range(2, steps + 1):
        for s in (0, 1):
            best = np.full(slots + 1, t * (t + 1) // 2, np.int32)
            if slots >= h:
                costs = scratch[: (slots + 1 - h) * (t - 1)].reshape(slots + 1 - h, t - 1)
                np.add(shifted[s, h:, 1:t], counts[1, : slots + 1 - h, t - 1 : 0 : -1], out=costs)
                np.minimum(best[h:], costs.min(axis=1), out=best[h:])
            if slots >= a:
                costs = scratch[: (slots + 1 - a) * (t - 1)].reshape(slots + 1 - a, t - 1)
                np.add(shifted[s, a:, : t - 1], counts[0, : slots + 1 - a, t - 1 : 0 : -1], out=costs)
                np.minimum(best[a:], costs.min(axis=1) + 1, out=best[a:])
            if s:
                _swap(best, counts, t, h, a)
            counts[s, :, t] = best
            shifted[s, :, t] = best + t


def _fill_windowed(padded: Counts, counts: Counts, w: int, h: int, a: int) -> None:
    """Only splits within w of the best one for t - 1. Entries not yet filled are `_NEVER`, so they never win."""
    slots, steps = counts.shape[1] - 1, counts.shape[2] - 1
    # windows[s, m, i] = counts[s, m, i - w : i + w + 1], contiguous, so that a gather copies whole rows.
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * w + 1, axis=2)
    offsets = np.arange(-w, w + 1, dtype=np.int32)
    hidden_at = np.ones((2, max(slots + 1 - h, 0)), np.int64)
    internal_at = np.ones((2, max(slots + 1 - a, 0)), np.int64)
    hidden_rows, internal_rows = np.arange(hidden_at.shape[1]), np.arange(internal_at.shape[1])
    for t in range(2, steps + 1):
        for s in (0, 1):
            best = np.full(slots + 1, min(t * (t + 1) // 2, _NEVER), np.int32)
            for rows, at, cost, back, after in (
                (hidden_rows, hidden_at[s], h, 0, 1),
                (internal_rows, internal_at[s], a, 1, 0),
            ):
                if not len(rows):
                    continue
                left = windows[s, rows + cost, at - back]
                left += windows[after, rows, t - at][:, ::-1]
                left += offsets
                move = left.argmin(axis=1)
                found = left[rows, move] + at
                np.minimum(best[cost:], found, out=best[cost:], casting="unsafe")
                at += move - w
                np.clip(at, 1, t - 1, out=at)
            if s:
                _swap(best, counts, t, h, a)
            counts[s, :, t] = best


def _swap(best: Counts, counts: Counts, t: int, h: int, a: int) -> None:
    """The last line of the recurrence, for all m at once."""
    least = a - h
    if least < len(best):
        np.minimum(best[least:], counts[0, : len(best) - least, t - 1] + 1, out=best[least:])
