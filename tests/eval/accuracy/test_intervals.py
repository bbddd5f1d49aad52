"""Intervals and tests over streams, on counts whose answer is known."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.eval.accuracy.intervals import _student, clustered, difference, holm, sign_flips, wilson

counts = st.lists(
    st.integers(0, 6).flatmap(lambda asked: st.tuples(st.integers(0, asked), st.just(asked))), max_size=30
)


@given(counts)
def test_an_interval_holds_its_share_and_is_no_narrower_than_that_of_independent_questions(
    streams: list[tuple[int, int]],
) -> None:
    found = clustered(streams)
    assert (found.right, found.asked) == (sum(r for r, _ in streams), sum(n for _, n in streams))
    alone = wilson(found.right, found.asked)
    assert 0 <= found.low <= alone.low <= found.share <= alone.high <= found.high <= 1


def test_questions_that_say_the_same_count_once() -> None:
    """Five questions of a stream that are all right or all wrong: no surer than one."""
    once = [(int(seed % 3 > 0), 1) for seed in range(40)]
    five = [(5 * right, 5 * asked) for right, asked in once]
    one, many = clustered(once), clustered(five)
    assert (one.low, one.high) == (many.low, many.high)
    assert wilson(many.right, many.asked).high - wilson(many.right, many.asked).low < 0.6 * (many.high - many.low)
    # Spread evenly over the streams, every question counts.
    even = clustered([(2, 3)] * 40)
    assert even.low == pytest.approx(wilson(80, 120).low, abs=0.005)


def test_one_stream_says_nothing_about_others() -> None:
    assert (clustered([(9, 10), (0, 0)]).low, clustered([(9, 10)]).high) == (0.0, 1.0)
    assert difference([(3, 10)]) == (0.3, -1.0, 1.0)
    assert difference([]) == (0.0, -1.0, 1.0)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    """Streams of eight questions whose share of right answers differs from stream to stream, around 0.8; 600 studies of 40 streams."""
    random = np.random.default_rng(0)
    held = held_alone = held_gap = 0
    for _ in range(600):
        ease = random.beta(2.4, 0.6, 40)
        right, other = random.binomial(8, ease), random.binomial(8, ease)
        found, alone = clustered([(int(r), 8) for r in right]), wilson(int(right.sum()), 320)
        held += found.low <= 0.8 <= found.high
        held_alone += alone.low <= 0.8 <= alone.high
        _, low, high = difference([(int(r - o), 8) for r, o in zip(right, other, strict=True)])
        held_gap += low <= 0 <= high
    assert 0.925 <= held / 600 <= 0.975
    assert held_alone / 600 < 0.8, "questions are not independent here"
    assert 0.925 <= held_gap / 600 <= 0.975


def test_a_difference_is_as_wide_as_that_of_its_streams() -> None:
    # Margins of +1 and 0 by turns on one question each: mean 0.5, and the standard error that of 16 numbers.
    gap, low, high = difference([(seed % 2, 1) for seed in range(16)])
    error = math.sqrt(16 / 15 * 16 * 0.25) / 16
    assert gap == 0.5
    assert (low, high) == pytest.approx((0.5 - 2.1314 * error, 0.5 + 2.1314 * error), abs=1e-3)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_the_sign_flips_are_all_ways(margins: list[int]) -> None:
    ways = [
        abs(sum(sign * margin for sign, margin in zip(signs, margins, strict=True)))
        for signs in product((-1, 1), repeat=len(margins))
    ]
    assert sign_flips(margins) == pytest.approx(sum(way >= abs(sum(margins)) for way in ways) / len(ways))


def test_a_stream_is_one_piece_of_evidence() -> None:
    assert sign_flips([1] * 10) == pytest.approx(2 / 2**10)
    assert sign_flips([7] * 10) == pytest.approx(2 / 2**10)
    assert sign_flips([300, -20, 0, 5] * 60) < 1e-12  # long studies too


def test_holm_s_rule() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (84, 1.989)]
)
def test_student_s_points(freedom: int, point: float) -> None:
    assert _student(freedom) == pytest.approx(point, rel=0.01)
