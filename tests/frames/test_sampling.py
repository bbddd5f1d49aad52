"""The sampling rule against a literal reading of it, and its invariants."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.errors import SourceError
from millpond.frames.sampling import Pending, check_fps, sample


def pictures(times: list[float]) -> list[Pending]:
    return [Pending(time, lambda: np.zeros((1, 1, 3), np.uint8)) for time in times]


def sampled(times: list[float], fps: float | None) -> list[float]:
    return [picture.seconds for picture in sample(pictures(times), fps)]


def first_at_or_after_each_tick(times: list[float], fps: float) -> list[float]:
    """Tick by tick, as the rule is worded."""
    early = min(0.002, 0.05 / fps)
    chosen: list[float] = []
    for tick in range(int((times[-1] - times[0]) * fps) + 2):
        due = [time for time in times if time - times[0] + early >= tick / fps]
        if due and (not chosen or due[0] > chosen[-1]):
            chosen.append(due[0])
    return chosen


# Milliseconds, and rates whose ticks do not fall on the edge of the tolerance to within rounding.
ascending = st.lists(st.integers(1, 3000), min_size=1, max_size=60).map(lambda gaps: (np.cumsum(gaps) / 1000).tolist())


@given(ascending, st.sampled_from([0.31, 1.0, 1.7, 2.0, 7.3, 29.97]))
def test_equals_the_literal_rule(times: list[float], fps: float) -> None:
    assert sampled(times, fps) == first_at_or_after_each_tick(times, fps)


@given(ascending, st.floats(0.01, 500))
def test_invents_nothing_repeats_nothing_and_begins_with_the_first(times: list[float], fps: float) -> None:
    chosen = sampled(times, fps)
    assert chosen[0] == times[0]
    assert set(chosen) <= set(times)
    assert all(a < b for a, b in pairwise(chosen))
    assert len(chosen) <= (times[-1] - times[0]) * fps + 1.06


def test_none_takes_every_frame() -> None:
    assert sampled([0.0, 0.001, 5.0], None) == [0.0, 0.001, 5.0]


@pytest.mark.parametrize("rate", [23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120])
def test_a_source_at_the_asked_rate_passes_whole_though_its_times_are_rounded(rate: float) -> None:
    times = [round(i / rate, 3) for i in range(2000)]  # Matroska
    assert sampled(times, rate) == times


def test_a_slower_source_passes_unchanged_and_a_gap_is_not_filled() -> None:
    assert sampled([0.0, 1.0, 60.0, 60.4], 2) == [0.0, 1.0, 60.0]


def test_times_need_not_begin_at_zero() -> None:
    assert sampled([7.3, 7.6, 7.8, 8.3], 2) == [7.3, 7.8, 8.3]


def test_a_huge_gap_takes_no_time() -> None:
    assert sampled([0.0, 1e15], 1000) == [0.0, 1e15]


def test_takes_a_frame_before_it_asks_for_the_next() -> None:
    seen: list[float] = []

    def feed() -> object:
        for picture in pictures([0.0, 0.1, 0.5]):
            seen.append(picture.seconds)
            yield picture

    chosen = sample(feed(), 2)  # type: ignore[arg-type]
    assert next(chosen).seconds == 0.0
    assert seen == [0.0]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), True, "2", 1e9])
def test_bad_rates(fps: float) -> None:
    with pytest.raises(SourceError, match="fps"):
        check_fps(fps)
