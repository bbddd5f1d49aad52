"""Plans: what every schedule must satisfy, what it costs, and what a budget buys."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millpond.errors import BudgetError
from millpond.recompute import RecomputeError, plan, plans, table
from millpond.recompute.closed_form import hidden_forwards, internal_forwards
from millpond.recompute.schedule import Op
from millpond.recompute.table import build_table, mixed_table

from .test_table import exhaustive


def play(length, actions):
    """Carry out a schedule on bare positions; fails on anything impossible. Returns (forwards, sets held over time)."""
    here, hidden, graphs, forwards, done, held = 0, set(), set(), 0, [], []
    for action in actions:
        if action.op in (Op.ADVANCE, Op.RUN):
            assert here == action.at < action.to
            forwards += action.to - action.at
            here = action.to
            if action.op is Op.RUN:
                assert action.to == action.at + 1
                graphs.add(action.to)
        elif action.op is Op.STORE:
            assert here == action.at not in hidden
            hidden.add(action.at)
        elif action.op is Op.DROP:
            hidden.remove(action.at)
        elif action.op is Op.RESTORE:
            assert action.at == 0 or action.at in hidden or action.at in graphs
            here = action.at
        else:
            graphs.remove(action.to)
            done.append(action.to)
            here = None
        held.append((frozenset(hidden), frozenset(graphs)))
    assert done == list(range(length, 0, -1))
    assert not hidden
    assert not graphs
    return forwards, held


@settings(max_examples=120, deadline=None)
@given(
    length=st.integers(1, 60),
    slots=st.integers(0, 70),
    internal=st.integers(1, 6),
    strategy=st.sampled_from(["hidden", "internal", "mixed", "auto"]),
)
def test_every_schedule_is_sound_and_costs_what_the_theory_says(length, slots, internal, strategy) -> None:
    made = plan(length=length, slots=slots, hidden_bytes=1, internal_bytes=internal, strategy=strategy)
    forwards, held = play(length, made.actions)
    expected = {
        "hidden": lambda: hidden_forwards(length, slots),
        "internal": lambda: internal_forwards(length, slots),
    }.get(strategy, lambda: build_table(length, slots, 1, internal, window=None).forwards(length, slots))()
    assert made.forwards == forwards == expected
    unit = {"hidden": (1, 0), "internal": (0, 1)}.get(strategy, (1, internal))
    # One graph is the working one.
    assert max(len(h) * unit[0] + max(len(g) - 1, 0) * unit[1] for h, g in held) <= slots


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 80), slots=st.integers(0, 60), strategy=st.sampled_from(["hidden", "internal", "mixed"]))
def test_the_forward_pass_comes_first_and_runs_every_step_once(length, slots, strategy) -> None:
    made = plan(length=length, slots=slots, hidden_bytes=2, internal_bytes=7, strategy=strategy)
    steps = []
    for action in made.actions:
        if action.op is Op.BACK:
            break
        if action.op in (Op.ADVANCE, Op.RUN):
            steps += range(action.at + 1, action.to + 1)
    assert steps == list(range(1, length + 1))


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 60),
    hidden=st.integers(1, 20),
    more=st.integers(0, 90),
    room=st.integers(0, 1500),
    strategy=st.sampled_from(["hidden", "internal", "mixed"]),
)
def test_a_budget_is_a_ceiling(length, hidden, more, room, strategy) -> None:
    internal = hidden + more
    made = plan(length=length, budget=internal + room, hidden_bytes=hidden, internal_bytes=internal, strategy=strategy)
    _, held = play(length, made.actions)
    peak = max(len(h) * hidden + (max(len(g) - 1, 0) + 1) * internal for h, g in held)
    assert peak <= made.peak_bytes <= internal + room


def plans_within(budget: int, length: int, hidden: int, internal: int):
    """The plan of every strategy for one budget in bytes."""
    sizes = {"length": length, "budget": budget, "hidden_bytes": hidden, "internal_bytes": internal}
    return {name: plan(**sizes, strategy=name) for name in ("auto", "hidden", "internal")}


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 5), hidden=st.integers(1, 9), more=st.integers(0, 25), room=st.integers(0, 90))
@example(length=2, hidden=5, more=12, room=17)
def test_a_budget_in_bytes_buys_the_optimum_over_all_schedules(length, hidden, more, room) -> None:
    internal = hidden + more
    made = plan(length=length, budget=internal + room, hidden_bytes=hidden, internal_bytes=internal)
    assert made.exact
    assert made.forwards == exhaustive(length, room, hidden, internal)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 90), hidden=st.integers(1, 5000), ratio=st.floats(1, 12), share=st.floats(0, 0.5, width=32)
)
def test_auto_is_never_worse_than_either_kind_alone(length, hidden, ratio, share) -> None:
    internal = int(hidden * ratio)
    plans = plans_within(internal + int(share * length * internal), length, hidden, internal)
    assert plans["auto"].forwards <= min(plans["hidden"].forwards, plans["internal"].forwards)


def test_auto_is_never_worse_where_a_table_in_bytes_would_be_too_large(monkeypatch) -> None:
    monkeypatch.setattr(table, "_EXACT_WORK", 1e6)
    plans._plan.cache_clear()
    chosen = set()
    for hidden, internal in [(1009, 1013), (1009, 4567), (1009, 1901), (997, 11_003)]:
        for states in (3, 20, 50):
            by_name = plans_within(internal * states + 500, 100, hidden, internal)
            auto = by_name["auto"]
            assert auto.forwards <= min(by_name["hidden"].forwards, by_name["internal"].forwards)
            # The sizes have no common divisor, so units of one kind alone are bytes, and coarse ones are not.
            chosen.add("exact" if auto.exact else "one kind" if auto.internal_units == internal else "coarse")
    plans._plan.cache_clear()
    assert chosen == {"exact", "coarse", "one kind"}


def test_the_unit_divides_both_states() -> None:
    """An internal state of 4.5 hidden ones: whole hidden states as units would round it up to 5."""
    made = plan(length=200, budget=4500 + 40_000, hidden_bytes=1000, internal_bytes=4500)
    assert (made.hidden_units, made.internal_units, made.slots) == (2, 9, 80)
    assert made.forwards < build_table(200, 40, 1, 5, window=None).forwards(200, 40)


def test_a_budget_for_everything_runs_every_step_once() -> None:
    made = plan(length=500, budget="1GB", hidden_bytes=1000, internal_bytes=4500)
    assert made.forwards == 500
    assert made.exact
    assert made.peak_bytes == made.full_bytes == 500 * 4500


def test_a_long_sequence_is_planned_by_a_bounded_search() -> None:
    """Beyond the exact table only splits near the last best one are tried."""
    made = plan(length=10_000, budget=4500 + 100_000, hidden_bytes=1000, internal_bytes=4500)
    near = mixed_table(10_000, 100, 1, 5)
    assert near is not None
    assert not made.exact
    assert not near.exact
    assert made.forwards <= near.forwards(10_000, 100)
    # No worse than internal or hidden states alone, whose optimum is known.
    assert made.forwards <= min(hidden_forwards(10_000, 100), internal_forwards(10_000, 22))


@pytest.mark.parametrize("strategy", ["hidden", "internal", "auto"])
def test_a_very_long_sequence_falls_back_on_the_closed_forms(strategy) -> None:
    made = plan(length=30_000, budget=3_000_000, hidden_bytes=1000, internal_bytes=4500, strategy=strategy)
    assert (
        made.forwards
        == {
            "hidden": hidden_forwards(30_000, 2995),
            "internal": internal_forwards(30_000, 665),
            "auto": internal_forwards(30_000, 665),
        }[strategy]
    )


def test_below_one_step_the_error_names_the_least() -> None:
    with pytest.raises(BudgetError, match="4500 bytes") as caught:
        plan(length=10, budget=4499, hidden_bytes=1000, internal_bytes=4500)
    assert caught.value.minimum == 4500
    assert plan(length=10, budget=4500, hidden_bytes=1000, internal_bytes=4500).forwards == 55


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "best"}, "unknown strategy"),
        ({"length": 0}, "at least one step"),
        ({"hidden_bytes": 0}, "hidden_bytes"),
        ({"hidden_bytes": 9}, "hidden_bytes"),
        ({"slots": 3}, "either budget"),
        ({"budget": None}, "either budget"),
    ],
)
def test_bad_arguments(change, message) -> None:
    with pytest.raises(RecomputeError, match=message):
        plan(**({"length": 10, "budget": 100, "hidden_bytes": 1, "internal_bytes": 5} | change))


def test_bad_sizes() -> None:
    with pytest.raises(BudgetError, match="negative"):
        plan(length=10, slots=-1, hidden_bytes=1, internal_bytes=5)
    with pytest.raises(BudgetError, match="lots"):
        plan(length=10, budget="lots", hidden_bytes=1, internal_bytes=5)
