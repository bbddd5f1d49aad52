"""From a budget in bytes to a schedule: which strategy, how many slots, how many forward evaluations, which peak.

Knows sizes in bytes and step counts; nothing about tensors. Costs are counted in forward evaluations of a step, as in
Gruslys et al., "Memory-Efficient Backpropagation Through Time" (NIPS 2016).
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any, Literal, TypeAlias, get_args

from millpond.errors import BudgetError, RecomputeError
from millpond.memory.budget import format_bytes, parse_bytes
from millpond.recompute.closed_form import hidden_forwards, internal_forwards
from millpond.recompute.schedule import Action, Mixed, OneKind, Op, Splitter, schedule
from millpond.recompute.table import fits_exactly, mixed_table
from millpond.recompute.timeline import Timeline, draw

Strategy: TypeAlias = Literal["auto", "hidden", "internal", "mixed"]

# Where a table in bytes would be too large, its unit is a hidden state or at most this small a fraction of one, and the
# internal state is rounded up to whole units.
_FINEST_UNITS = 16
# What a finer unit has to save, as a share of the internal state, to be worth its larger table.
_WORTH_A_FINER_UNIT = 0.005


@dataclass(frozen=True)
class Plan:
    """When to run, store and recompute, for one length, one budget and one step size.

    Attributes:
        length: steps T.
        strategy: what is stored: "hidden", "internal" or "mixed".
        hidden_bytes, internal_bytes: one stored hidden state; one internal state, its start and end states included.
        budget_bytes: the cap, or None if slots were given.
        slots: units of memory beside the initial state and one working internal state. For a mixed plan within a budget
            a unit is the largest number of bytes that divides both states, or coarser where that table would be too large.
        hidden_units, internal_units: what a stored state costs in these units.
        forwards: forward evaluations of a step in all, the forward pass included; T at least, T (T + 1) / 2 at most.
        peak_bytes: the most stored at any time, the working internal state included. At most the budget.
        exact: no schedule that stores such states takes fewer forwards within the budget (or the slots); otherwise it is
            the best plan that a bounded search found.
        actions: the schedule.
    """

    length: int
    strategy: Strategy
    hidden_bytes: int
    internal_bytes: int
    budget_bytes: int | None
    slots: int
    hidden_units: int
    internal_units: int
    forwards: int
    peak_bytes: int
    exact: bool
    actions: tuple[Action, ...] = field(repr=False)

    @property
    def forwards_per_step(self) -> float:
        """How often a step runs on average; 1 is plain backpropagation."""
        return self.forwards / self.length

    @property
    def full_bytes(self) -> int:
        """What plain backpropagation stores: every internal state."""
        return self.length * self.internal_bytes

    @property
    def timeline(self) -> Timeline:
        """What is stored when; `.text()` and `.save_png(path)` draw it."""
        return draw(self.length, self.actions)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and names, without its actions."""
        numbers = {key: value for key, value in asdict(self).items() if key != "actions"}
        return {**numbers, "forwards_per_step": self.forwards_per_step, "full_bytes": self.full_bytes}


def plan(
    *,
    length: int,
    hidden_bytes: int,
    internal_bytes: int,
    budget: str | int | None = None,
    slots: int | None = None,
    strategy: Strategy = "auto",
) -> Plan:
    """Plan backpropagation through `length` steps.

    Args:
        length: steps T, at least 1.
        hidden_bytes: one hidden state, from which the sequence can go on.
        internal_bytes: everything that backpropagating through one step needs, its start and end states included.
            `millpond.recompute.measure` measures both on a real step.
        budget: the most bytes of stored activations, as a number or for example "64MiB". Or:
        slots: stored states beside the initial state and one working internal state: hidden states, for "internal"
            internal states; for "mixed" units of one hidden state.
        strategy: "hidden" (revolve), "internal", "mixed" (their joint optimum) or "auto", which is the mixed one.

    Raises:
        BudgetError: below one internal state, the minimum that works (named in the message and in `.minimum`).
        RecomputeError: an argument that cannot work.
    """
    if strategy not in get_args(Strategy):
        raise RecomputeError(f"unknown strategy {strategy!r}: choose from {', '.join(get_args(Strategy))}")
    if length < 1:
        raise RecomputeError(f"a sequence needs at least one step, not {length}")
    if not 0 < hidden_bytes <= internal_bytes:
        raise RecomputeError(
            f"hidden_bytes must be positive and at most internal_bytes, which holds the state too; "
            f"got {hidden_bytes} and {internal_bytes}"
        )
    if (budget is None) == (slots is None):
        raise RecomputeError("give either budget (bytes) or slots (stored states)")
    if slots is not None and slots < 0:
        raise BudgetError(f"slots must not be negative, got {slots}", minimum=0)
    kind: Strategy = "mixed" if strategy == "auto" else strategy
    cap = None if budget is None else parse_bytes(budget)
    if cap is not None and cap < internal_bytes:
        raise BudgetError(
            f"a budget of {format_bytes(cap)} is below one step: the minimum that works is {internal_bytes} bytes "
            f"({format_bytes(internal_bytes)}), the internal state of the step at work",
            minimum=internal_bytes,
        )
    return _plan(length, hidden_bytes, internal_bytes, cap, slots, kind)


@lru_cache(maxsize=64)
def _plan(length: int, hidden: int, internal: int, cap: int | None, slots: int | None, strategy: Strategy) -> Plan:
    """`plan`, with checked arguments."""
    free = None if cap is None else cap - internal
    if strategy == "hidden" or strategy == "internal":
        each = hidden if strategy == "hidden" else internal
        splitter: Splitter = OneKind(strategy)
        m, exact = min((slots or 0) if free is None else free // each, length - 1), True
    else:
        splitter, m, exact = _mixed(length, hidden, internal, free, slots)
    actions = tuple(schedule(length, m, splitter))
    forwards, peak = _run(actions, hidden, internal)
    return Plan(
        length=length,
        strategy=strategy,
        hidden_bytes=hidden,
        internal_bytes=internal,
        budget_bytes=cap,
        slots=m,
        hidden_units=splitter.hidden_units,
        internal_units=splitter.internal_units,
        forwards=forwards,
        peak_bytes=peak,
        exact=exact,
        actions=actions,
    )


def _mixed(length: int, hidden: int, internal: int, free: int | None, slots: int | None) -> tuple[Splitter, int, bool]:
    """The splitter, its slots and whether it is exact, for `free` bytes or `slots` units of one hidden state."""
    if free is None:
        h, a, m = 1, -(-internal // hidden), slots or 0
    else:
        unit = gcd(hidden, internal)
        h, a, m = hidden // unit, internal // unit, free // unit
    if m >= a * (length - 1):
        return Mixed(h, a, None), a * (length - 1), True
    if fits_exactly(length, m, h, a):
        return Mixed(h, a, mixed_table(length, m, h, a)), m, True
    # Now what is found need not be the optimum, so it has to be no worse than either kind of state alone.
    hidden_alone, internal_alone = hidden_forwards(length, m // h), internal_forwards(length, m // a)
    coarse_h = _coarse_unit(length, h, a, m)
    coarse_a, coarse_m = -(-a * coarse_h // h), m * coarse_h // h
    # Where internal states alone run no step three times, mixing saves less than one per cent (measured in the tests),
    # and a table beyond the exact search takes seconds.
    if internal_alone >= 2 * length or fits_exactly(length, coarse_m, coarse_h, coarse_a):
        table = mixed_table(length, coarse_m, coarse_h, coarse_a)
        if table is not None and table.forwards(length, coarse_m) <= min(hidden_alone, internal_alone):
            return Mixed(coarse_h, coarse_a, table), coarse_m, False
    if internal_alone <= hidden_alone:
        return OneKind("internal", a, a), m // a * a, False
    return OneKind("hidden", h, a), m // h * h, False


def _coarse_unit(length: int, h: int, a: int, m: int) -> int:
    """Units a hidden state: the fewest whose rounding up of the internal state wastes little, where the table is exact."""

    def waste(units: int) -> float:
        return -(-a * units // h) * h / (a * units) - 1

    best = 1
    for units in range(2, _FINEST_UNITS + 1):
        better = waste(units) < waste(best) - _WORTH_A_FINER_UNIT
        if better and fits_exactly(length, m * units // h, units, -(-a * units // h)):
            best = units
    return best


def _run(actions: tuple[Action, ...], hidden: int, internal: int) -> tuple[int, int]:
    """Forward evaluations, and the peak in bytes with one working internal state set aside, by going through a plan."""
    forwards = peak = stored = 0
    kept: deque[int] = deque()
    for action, following in zip(actions, (*actions[1:], None), strict=True):
        if action.op in (Op.ADVANCE, Op.RUN):
            forwards += action.to - action.at
        if action.op is Op.RUN and following is not None and following.op is not Op.BACK:
            kept.append(action.to)
            stored += internal
        elif action.op is Op.BACK and kept and kept[-1] == action.to:
            kept.pop()
            stored -= internal
        elif action.op is Op.STORE:
            stored += hidden
        elif action.op is Op.DROP:
            stored -= hidden
        peak = max(peak, stored)
    return forwards, peak + internal
