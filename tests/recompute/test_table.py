"""The counts against exhaustive search, against each other, and against the published figures."""

import heapq
from itertools import count

import numpy as np
import pytest

from millpond.recompute.closed_form import hidden_forwards, hidden_split, internal_forwards, internal_split
from millpond.recompute.table import build_table, mixed_table


def exhaustive(length: int, slots: int, hidden: int, internal: int) -> int:
    """Least forward evaluations over all ways of running, storing and dropping: Dijkstra over what is held."""
    order = count()
    start = (0, frozenset(), length)
    best = {start: 0}
    queue = [(0, next(order), start)]
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        here, held, todo = state
        if todo == 0:
            return cost
        used = sum(hidden if kind == "h" else internal for kind, _ in held)
        moves = [(0, (here, held - {item}, todo)) for item in held]
        moves += [(0, (position, held, todo)) for _, position in held]
        moves.append((0, (0, held, todo)))
        if ("i", todo) in held:
            moves.append((0, (None, held - {("i", todo)}, todo - 1)))
        if here is not None and here < todo:
            moves.append((1, (here + 1, held, todo)))
            if here == todo - 1:
                moves.append((1, (None, held, todo - 1)))
            if used + hidden <= slots:
                moves.append((0, (here, held | {("h", here)}, todo)))
            if used + internal <= slots:
                moves.append((1, (here + 1, held | {("i", here + 1)}, todo)))
        for price, following in moves:
            if cost + price < best.get(following, 10**9):
                best[following] = cost + price
                heapq.heappush(queue, (cost + price, next(order), following))
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("hidden", "internal", "most_slots"), [(1, 1, 3), (1, 2, 4), (1, 3, 5), (1, 4, 5), (2, 5, 7), (2, 3, 6)]
)
def test_the_table_equals_exhaustive_search(hidden: int, internal: int, most_slots: int) -> None:
    table = build_table(7, most_slots, hidden, internal, window=None)
    for length in range(1, 8 if internal > 2 else 7):
        for slots in range(most_slots + 1):
            assert table.forwards(length, slots) == exhaustive(length, slots, hidden, internal), (length, slots)


def recurrence(steps: int, slots: int, back: int) -> np.ndarray:
    """min_y y + C(t-y, m-1) + C(y-back, m), straight from the paper: hidden states for back = 0, internal for 1."""
    counts = np.zeros((steps + 1, slots + 1), np.int64)
    for t in range(1, steps + 1):
        for m in range(slots + 1):
            options = [t * (t + 1) // 2]
            if m:
                options += [y + counts[t - y, m - 1] + counts[y - back, m] for y in range(1, t)]
            counts[t, m] = min(options) if t > 1 else 1
    return counts


@pytest.mark.parametrize(
    ("forwards", "split", "back"), [(hidden_forwards, hidden_split, 0), (internal_forwards, internal_split, 1)]
)
def test_the_closed_forms_equal_the_recurrence(forwards, split, back: int) -> None:
    counts = recurrence(90, 12, back)
    for t in range(91):
        for m in range(13):
            assert forwards(t, m) == counts[t, m], (t, m)
            if t > 1 and m > 0:
                y = split(t, m)
                assert 1 <= y < t
                assert y + counts[t - y, m - 1] + counts[y - back, m] == counts[t, m], (t, m, y)


def test_figures_of_the_paper() -> None:
    """Forward evaluations per step at T = 1000; the paper counts the working state among the slots."""
    slots = (5, 10, 20, 50)
    assert [round(hidden_forwards(1000, m - 1) / 1000, 3) for m in slots] == [7.284, 4.636, 3.747, 2.948]
    assert [round(internal_forwards(1000, m - 1) / 1000, 3) for m in slots] == [6.292, 3.640, 2.750, 1.950]


@pytest.mark.parametrize(("share", "times"), [(0.01, 1.57), (0.02, 1.33), (0.05, 1.32)])
def test_headline_of_the_paper(share: float, times: float) -> None:
    """Mixed, an internal state of 5 hidden ones, T = 1000, a backward worth two forwards."""
    slots = round(share * 5 * 1000)
    table = mixed_table(1000, slots, 1, 5)
    assert table is not None
    assert table.exact
    assert (table.forwards(1000, slots) / 1000 + 2) / 3 == pytest.approx(times, abs=0.005)


def test_the_swap_saves_a_forward() -> None:
    """The case for which the paper's recurrence gives 14."""
    assert build_table(7, 3, 1, 3, window=None).forwards(7, 3) == 13


@pytest.mark.parametrize("internal", [1, 2, 5, 9])
def test_the_windowed_search_is_near_the_optimum(internal: int) -> None:
    exact = build_table(300, 80, 1, internal, window=None).counts[0].astype(float)
    near = build_table(300, 80, 1, internal, window=16).counts[0]
    assert (near >= exact).all()
    assert (near[:, 1:] / exact[:, 1:]).max() < 1.002
    if internal == 1:  # convex, so a local optimum is the optimum
        assert (near == exact).all()


def test_one_table_serves_shorter_lengths_and_smaller_budgets() -> None:
    large = mixed_table(200, 40, 1, 7)
    assert large is not None
    small = mixed_table(90, 12, 1, 7)
    assert small is large
    fresh = build_table(90, 12, 1, 7, window=None)
    assert (large.counts[:, :13, :91] == fresh.counts).all()


@pytest.mark.parametrize("internal", [2, 5])
def test_internal_alone_is_near_the_optimum_where_no_step_runs_three_times(internal: int) -> None:
    """What a plan too long for the exact table relies on."""
    length, most = 1000, 60 * internal
    table = build_table(length, most, 1, internal, window=None)
    alone = [internal_forwards(length, m // internal) for m in range(most + 1)]
    gaps = [alone[m] / table.forwards(length, m) - 1 for m in range(most + 1) if alone[m] < 2 * length]
    assert len(gaps) > 10 * internal
    assert 0 <= max(gaps) < 0.006
