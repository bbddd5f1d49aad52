"""Reading what people type."""

import pytest
import typer

from millpond.cli.live import clock
from millpond.cli.options import FrameSize, Moment, join_moments, read_moment, read_size


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--ask-at", "12.5", "What now?"], ["--ask-at=12.5 What now?"]),
        (["--ask-at=12.5", "What now?"], ["--ask-at=12.5 What now?"]),
        (["--ask-at", "12.5 What now?"], ["--ask-at=12.5 What now?"]),
        (["--ask-at", "1", "-v?", "--ask-at", "2", "b", "x"], ["--ask-at=1 -v?", "--ask-at=2 b", "x"]),
        (["--ask-at"], ["--ask-at="]),
        (["--ask-at", "3"], ["--ask-at=3 "]),
        (["a", "--", "--ask-at", "1", "b"], ["a", "--", "--ask-at", "1", "b"]),
        (["--ask", "--ask-at"], ["--ask", "--ask-at="]),
    ],
)
def test_the_two_words_behind_ask_at_become_one(words: list[str], joined: list[str]) -> None:
    assert join_moments(words) == joined


def test_a_moment() -> None:
    assert read_moment("12.5 What now?") == Moment(12.5, "What now?")


@pytest.mark.parametrize("value", ["", "soon what", "-1 what", "nan what", "inf what", "3", "3  "])
def test_not_a_moment(value: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_moment(value)


@pytest.mark.parametrize("value", ["640x480", " 640X480 ", "640 × 480"])
def test_a_size(value: str) -> None:
    assert read_size(value) == FrameSize(width=640, height=480)


@pytest.mark.parametrize("value", ["", "640", "0x480", "-1x480", "640x480x3", "ax b"])
def test_not_a_size(value: str) -> None:
    with pytest.raises(typer.BadParameter):
        read_size(value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00.0"), (12.5, "00:12.5"), (59.96, "00:59.9"), (61, "01:01.0"), (3725.5, "1:02:05.5")]
)
def test_the_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
