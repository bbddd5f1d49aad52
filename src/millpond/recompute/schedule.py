"""A plan as a list of actions: run, store, restore, backpropagate, drop.

Positions count states: state 0 is the initial one, step i leads from state i - 1 to state i. A schedule visits the
backward of steps T, T-1, ..., 1 once each, and before the first backward it runs every step exactly once, in order, so
that part is the forward pass. Knows slots and counts; nothing about bytes or tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from millpond.recompute.closed_form import hidden_split, internal_split
from millpond.recompute.table import Move, Table


class Op(Enum):
    """What an action does with the working state."""

    ADVANCE = "advance"  # run the steps behind `at`, up to `to`, keeping only the state
    RUN = "run"  # run step `to` and keep its graph
    BACK = "back"  # backpropagate through step `to` and drop its graph
    STORE = "store"  # keep the working state, `at`
    RESTORE = "restore"  # work on from the kept state `at`
    DROP = "drop"  # give the stored state `at` back


class Action(NamedTuple):
    """One action. `at` is the position before it, `to` the position behind it; the same where nothing runs."""

    op: Op
    at: int
    to: int


class Splitter(Protocol):
    """Says how a segment begins."""

    @property
    def hidden_units(self) -> int:
        """Units of memory that a stored hidden state takes."""

    @property
    def internal_units(self) -> int:
        """Units of memory that a kept internal state takes."""

    def split(self, t: int, m: int, s: int) -> tuple[Move, int]:
        """The first move for t >= 2 steps with m units; s = 1 if the start state's memory may be taken."""


@dataclass(frozen=True)
class OneKind:
    """Stores hidden states only (revolve), or internal ones only; the same curve, see `millpond.recompute.closed_form`."""

    kind: Literal["hidden", "internal"]
    hidden_units: int = 1
    internal_units: int = 1

    def split(self, t: int, m: int, s: int) -> tuple[Move, int]:
        hidden = self.kind == "hidden"
        held = m // (self.hidden_units if hidden else self.internal_units)
        return (self.kind, (hidden_split if hidden else internal_split)(t, held)) if held else ("sweep", 0)


@dataclass(frozen=True)
class Mixed:
    """The optimum over both kinds, from a table; without one it can only keep everything."""

    hidden_units: int
    internal_units: int
    table: Table | None

    def split(self, t: int, m: int, s: int) -> tuple[Move, int]:
        if self.table is None or m >= self.internal_units * (t - 1):
            return "internal", 1
        return self.table.split(t, m, s)


def schedule(length: int, slots: int, splitter: Splitter) -> Iterator[Action]:
    """The actions for `length` steps with `slots` units beside the initial state and one working internal state.

    A segment is (start, t, m, s) as in `millpond.recompute.table`. The stack holds what is left to do, so that long
    sequences need no recursion.
    """
    here: int | None = 0
    stored: set[int] = set()
    todo: list[Action | tuple[int, int, int, int]] = [(0, length, slots, 0)]
    while todo:
        item = todo.pop()
        if isinstance(item, Action):
            if item.op is Op.BACK:
                here = None
            elif item.at not in stored:
                continue  # a swap has dropped it already
            else:
                stored.remove(item.at)
            yield item
            continue
        start, t, m, s = item
        if t == 0:
            continue
        move, y = splitter.split(t, m, s) if t > 1 else ("sweep", 0)
        if move == "sweep":
            todo += [(start, t - 1, m, s), Action(Op.BACK, start + t, start + t)]
            y = t
        elif move == "hidden":
            todo += [(start, y, m, s), Action(Op.DROP, start + y, start + y)]
            todo += [(start + y, t - y, m - splitter.hidden_units, 1)]
        elif move == "internal":
            todo += [(start, y - 1, m, s), Action(Op.BACK, start + y, start + y)]
            todo += [(start + y, t - y, m - splitter.internal_units, 0)]
        else:
            todo += [Action(Op.BACK, start + 1, start + 1)]
            todo += [(start + 1, t - 1, m + splitter.hidden_units - splitter.internal_units, 0)]
        if here != start:
            yield Action(Op.RESTORE, start, start)
        here = start + y
        if move == "hidden":
            yield Action(Op.ADVANCE, start, here)
            yield Action(Op.STORE, here, here)
            stored.add(here)
            continue
        if y > 1:
            yield Action(Op.ADVANCE, start, here - 1)
        if move == "swap":  # the working state is the start state still, until the step has run
            stored.remove(start)
            yield Action(Op.DROP, start, start)
        yield Action(Op.RUN, here - 1, here)
