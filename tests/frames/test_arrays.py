"""Frames from iterables, and the frame itself."""

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from millpond import frames
from millpond.errors import SourceError
from millpond.frames import Frame
from tests.frames.media import gray


def test_pairs_and_frames_keep_their_times_and_pixels() -> None:
    first, second = gray(1), gray(2)
    with frames.open([(3.5, first), Frame(np.float32(4.0), second)]) as source:  # type: ignore[arg-type]
        assert (source.info.kind, source.info.live, source.dropped) == ("frames", False, 0)
        taken = list(source)
    assert [frame.seconds for frame in taken] == [3.5, 4.0]
    assert taken[0].pixels is first
    assert taken[1].pixels is second


def test_nothing_is_read_ahead() -> None:
    made: list[int] = []

    def camera() -> Iterator[tuple[float, np.ndarray]]:
        for index in range(1000):
            made.append(index)
            yield index / 10, gray(index % 256)

    source = frames.open(camera(), fps=2)
    assert made == []
    assert [next(source).seconds, next(source).seconds] == [0.0, 0.5]
    assert made == [0, 1, 2, 3, 4, 5]
    source.close()
    assert list(source) == []


def test_a_frame_is_let_go_when_its_taker_lets_go() -> None:
    source = frames.open((i / 10, gray(i)) for i in range(10))
    kept = weakref.ref(next(source).pixels)
    next(source)
    gc.collect()
    assert kept() is None


def test_taking_goes_on_where_it_stopped() -> None:
    source = frames.open([(float(i), gray(i)) for i in range(5)])
    for frame in source:
        if frame.seconds == 1.0:
            break
    assert [frame.seconds for frame in source] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(0.0, gray(0)), (0.0, gray(0))], "ascend"),
        ([(1.0, gray(0)), (0.5, gray(0))], "ascend"),
        ([(0.0, gray(0).astype(np.float32))], "uint8"),
        ([(0.0, gray(0)[..., 0])], "uint8"),
        ([(0.0, np.zeros((3, 4, 5), np.uint8))], "uint8"),
        ([(0.0, np.zeros((0, 4, 3), np.uint8))], "uint8"),
        ([(0.0, [[[1, 2, 3]]])], "numpy"),
        ([(float("nan"), gray(0))], "finite"),
        ([("0", gray(0))], "number"),
        ([gray(0)], "item 0"),
        (gray(0), "item 0"),
        ([(0.0, gray(0), 1)], "item 0"),
    ],
)
def test_what_is_not_a_frame(items: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list(frames.open(items))  # type: ignore[arg-type]


def test_frames_before_a_bad_one_are_given_out() -> None:
    source = frames.open([(0.0, gray(0)), (1.0, gray(1)), (0.5, gray(2))])
    assert [next(source).seconds, next(source).seconds] == [0.0, 1.0]
    with pytest.raises(SourceError):
        next(source)
    assert list(source) == []


@pytest.mark.parametrize("source", [3, None, object(), Frame(0.0, gray(0))])
def test_what_is_not_a_source(source: object) -> None:
    with pytest.raises(SourceError, match="cannot watch"):
        frames.open(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [{"fps": 0}, {"fps": -2}, {"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}]
)
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(SourceError):
        frames.open([], **arguments)  # type: ignore[arg-type]


def test_an_error_of_the_iterable_itself_comes_through() -> None:
    def camera() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, gray(0)
        raise ZeroDivisionError

    for live in (None, True):
        source = frames.open(camera(), live=live)
        next(source)
        with pytest.raises(ZeroDivisionError):
            next(source)


def test_no_frames_is_no_error() -> None:
    assert list(frames.open([])) == []


def test_the_repr_of_a_frame_is_short() -> None:
    assert repr(Frame(1.5, gray(0))) == "Frame(1.500 s, 64x48)"
