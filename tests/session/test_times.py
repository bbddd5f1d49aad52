"""Frames at times that a stream cannot reach are refused, and the stream goes on."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from millpond import Session, SourceError
from millpond.frames import Frame
from tests.models.tiny import tiny
from tests.session.frames import moving

PIXELS = np.zeros((56, 56, 3), np.uint8)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (1e13, "within 1e"),
        (9.3e12, "within 1e"),
        (-1e13, "ascend"),
        (1e10, "more than a year"),
        (float("inf"), "finite"),
        (float("nan"), "finite"),
    ],
)
def test_a_frame_out_of_reach_is_refused_and_the_stream_goes_on(name: str, seconds: float, message: str) -> None:
    family = tiny(name)
    session, twin = (Session(family, budget="300KiB") for _ in range(2))
    frames = list(moving(11))
    session.feed(frames[:7])
    twin.feed(frames[:7])
    with pytest.raises(SourceError, match=message) as caught:
        session.feed(Frame(seconds, PIXELS))
    assert "\n" not in str(caught.value)
    session.feed(frames[7:])
    twin.feed(frames[7:])
    assert session.usage.frames_seen == twin.usage.frames_seen == 11
    assert session.ask("what", max_new_tokens=4).token_ids == twin.ask("what", max_new_tokens=4).token_ids


@pytest.mark.parametrize("seconds", [1e13, -1e13])
def test_also_as_the_first_frame_and_within_a_source(seconds: float) -> None:
    session = Session(tiny("qwen2_5_vl"), budget="300KiB")
    with pytest.raises(SourceError, match="within 1e"):
        session.feed(Frame(seconds, PIXELS))
    with pytest.raises(SourceError, match="within 1e"):
        session.feed([*moving(4), Frame(1e13, PIXELS)])
    session.feed(list(moving(2, start=3)))
    assert session.usage.frames_seen == 6


@pytest.mark.parametrize("start", [-5000.0, 1.7e9])
def test_a_clock_may_begin_anywhere(start: float) -> None:
    family = tiny("qwen2_5_vl")
    session, twin = (Session(family, budget="300KiB") for _ in range(2))
    session.feed(list(moving(41, start=start)))
    twin.feed(list(moving(41)))
    assert session.ask("what", max_new_tokens=6).token_ids == twin.ask("what", max_new_tokens=6).token_ids
    assert session.usage.timestamps_kept == twin.usage.timestamps_kept


def test_what_is_no_frame_is_one_line() -> None:
    class Odd:
        dropped = 0

        def __iter__(self) -> Iterator[object]:
            yield from moving(2)
            yield SimpleNamespace(seconds=2.0, pixels=PIXELS[:0])

    session = Session(tiny("qwen2_5_vl"), budget="300KiB")
    with pytest.raises(SourceError, match="must give frames, not SimpleNamespace"):
        session.feed(Odd())
    assert session.usage.frames_seen == 2
