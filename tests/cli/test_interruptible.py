"""The source between a source and a session: segments, stopping, drops, errors."""

import threading
import time
from collections.abc import Iterator

import pytest

from millpond.cli.interruptible import InterruptibleSource
from millpond.errors import SourceError
from millpond.frames import Frame
from tests.session.frames import moving


class Source:
    """Frames of half a second each; drops two before every frame, as a slow consumer of a camera would see."""

    def __init__(self, count: int, *, breaks: bool = False) -> None:
        self.count, self.breaks, self.dropped = count, breaks, 0

    def __iter__(self) -> Iterator[Frame]:
        for frame in moving(self.count, height=8, width=24):
            self.dropped += 2
            yield frame
        if self.breaks:
            raise SourceError("the cable is out")


@pytest.mark.parametrize("limit", [0.0, 0.9, 1.0, 1.0001, 2.25, 4.4])
def test_a_stretch_holds_the_frames_up_to_its_moment_and_the_next_goes_on_behind_it(limit: float) -> None:
    frames = InterruptibleSource(Source(10))
    first = [frame.seconds for frame in frames.until(limit)]
    assert first == [step / 2 for step in range(10) if step / 2 <= limit]
    assert frames.reached
    assert not frames.ended
    rest = [frame.seconds for frame in frames.until(None)]
    assert first + rest == [step / 2 for step in range(10)]
    assert frames.ended
    frames.close()


def test_a_moment_behind_the_end_is_not_reached() -> None:
    frames = InterruptibleSource(Source(3))
    assert len(list(frames.until(60.0))) == 3
    assert frames.ended
    assert not frames.reached
    frames.close()


def test_drops_between_stretches_are_counted_once() -> None:
    """A session adds up `dropped` after minus before; drops while it answers lie between two stretches."""
    source = Source(10)
    frames = InterruptibleSource(source)
    counted = 0
    for limit in (1.0, 3.0, None):
        before = frames.dropped
        list(frames.until(limit))
        counted += frames.dropped - before
    assert counted == source.dropped == 20
    frames.close()


def test_an_error_comes_after_the_frames_before_it() -> None:
    frames = InterruptibleSource(Source(3, breaks=True))
    taken = iter(frames)
    assert [next(taken).seconds for _ in range(3)] == [0.0, 0.5, 1.0]
    with pytest.raises(SourceError, match="cable"):
        next(taken)
    assert frames.ended
    frames.close()


def test_stop_ends_a_stretch_of_a_silent_source() -> None:
    silent = threading.Event()

    class Silent:
        def __iter__(self) -> Iterator[Frame]:
            silent.wait()
            yield from ()

    frames = InterruptibleSource(Silent())
    threading.Timer(0.1, frames.stop).start()
    assert list(frames) == []
    assert frames.stopped
    silent.set()
    frames.close()


def test_no_frame_is_taken_before_it_is_wanted() -> None:
    """A live source replaces what was not taken; a frame that a thread holds on to would be old."""
    source = Source(1000)
    frames = InterruptibleSource(source)
    next(iter(frames))
    time.sleep(0.2)
    assert source.dropped == 2
    frames.close()
    assert not frames._thread.is_alive()


def test_closing_closes_the_source() -> None:
    class Closable(Source):
        closed = False

        def close(self) -> None:
            self.closed = True

    source = Closable(10)
    frames = InterruptibleSource(source)
    next(iter(frames))
    frames.close()
    assert source.closed
    assert list(frames) == []
