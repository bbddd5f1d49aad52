"""The reading thread: dropping to the latest, and connecting again, with fake feeds and a fake clock."""

import gc
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from millpond.errors import SourceError
from millpond.frames.reader import Backoff, Mailbox, Reader
from millpond.frames.sampling import Pending
from millpond.frames.source import Event, Source, SourceInfo

PATIENCE_SECONDS = 20.0  # only a broken reader waits so long


def picture(seconds: float) -> Pending:
    return Pending(seconds, lambda: np.zeros((2, 2, 3), np.uint8))


class FakeClock:
    """Time passes only when somebody waits, or a feed says so."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self.waits.append(seconds)
        self.time += max(0.0, seconds)


class FakeFeed:
    """Gives scripted steps: a number is a picture at that time, anything callable is called."""

    def __init__(self, *steps: float | Callable[[], object], live: bool = True, fault: str = "") -> None:
        self.info = SourceInfo(name="rtsp://cam", kind="url", live=live)
        self.damaged = 0
        self.cancelled = threading.Event()
        self.closed = threading.Event()
        self._steps, self._fault = steps, fault

    def __iter__(self) -> Iterator[Pending]:
        for step in self._steps:
            if callable(step):
                step()
            else:
                yield picture(step)
        if self._fault:
            raise SourceError(self._fault)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed.set()


def connecting(*attempts: FakeFeed | str) -> Callable[[], FakeFeed]:
    """Connects in turn; a text is a failure."""
    left = iter(attempts)

    def connect() -> FakeFeed:
        attempt = next(left)
        if isinstance(attempt, str):
            raise SourceError(attempt)
        return attempt

    return connect


def reader(
    *attempts: FakeFeed | str, clock: FakeClock | None = None, fps: float | None = None, retries: int = 3
) -> Reader:
    return Reader(connecting(*attempts), fps=fps, backoff=Backoff(retries), clock=clock or FakeClock())


def everything(engine: Reader) -> tuple[list[float], str]:
    """All times taken, and the error at the end."""
    seconds: list[float] = []
    try:
        while (taken := engine.take()) is not None:
            seconds.append(taken.seconds)
    except SourceError as error:
        return seconds, str(error)
    return seconds, ""


def test_a_slow_consumer_gets_the_latest_and_the_rest_is_counted() -> None:
    resume, passed = threading.Event(), threading.Event()
    feed = FakeFeed(
        0.0, lambda: resume.wait(PATIENCE_SECONDS), 0.1, 0.2, 0.3, 0.4, passed.set, lambda: resume.wait(0.0)
    )
    engine = Reader(connecting(feed), fps=None, clock=FakeClock())
    first = engine.take()
    assert first is not None
    assert first.seconds == 0.0
    resume.set()
    assert passed.wait(PATIENCE_SECONDS)
    latest = engine.take()
    assert latest is not None
    assert latest.seconds == 0.4
    assert engine.dropped == 3
    assert engine.take() is None
    assert feed.closed.is_set()


def test_frames_that_sampling_leaves_out_are_not_dropped() -> None:
    passed = threading.Event()
    feed = FakeFeed(0.0, *[i / 10 for i in range(1, 11)], passed.set)
    engine = Reader(connecting(feed), fps=2, clock=FakeClock())
    taken = engine.take()
    assert taken is not None
    assert passed.wait(PATIENCE_SECONDS)
    seconds, _ = everything(engine)
    assert 1 + len(seconds) + engine.dropped == 3  # 0.0, 0.5, 1.0


def test_a_feed_that_is_not_live_waits_for_the_consumer() -> None:
    engine = Reader(connecting(FakeFeed(*[i / 10 for i in range(50)], live=False)), fps=None)
    assert everything(engine) == ([i / 10 for i in range(50)], "")
    assert engine.dropped == 0


def test_nothing_is_read_before_the_first_is_wanted() -> None:
    begun = threading.Event()
    engine = Reader(connecting(FakeFeed(begun.set, 0.0)), fps=None)
    assert not begun.wait(0.05)
    assert engine.take() is not None
    assert begun.is_set()
    engine.close()


def test_connects_again_and_time_goes_on() -> None:
    clock = FakeClock()

    def passes(seconds: float) -> Callable[[], None]:
        def step() -> None:
            clock.time += seconds

        return step

    taken: list[float] = []
    turn = threading.Semaphore(0)

    def lockstep() -> None:
        assert turn.acquire(timeout=PATIENCE_SECONDS)

    first = FakeFeed(0.0, lockstep, passes(1.0), 1.0, lockstep, passes(7.0), fault="broke")
    # The camera counts from 500 after its restart; 7 s silent, then 0.5 + 1 + 2 s of waiting pass.
    second = FakeFeed(500.0, lockstep, passes(1.0), 501.0, lockstep)
    events: list[Event] = []
    engine = Reader(
        connecting(first, "down", "down", second, *["gone"] * 3),
        fps=None,
        backoff=Backoff(3),
        clock=clock,
        on_event=events.append,
    )
    for _ in range(4):
        got = engine.take()
        assert got is not None
        taken.append(got.seconds)
        turn.release()
    assert taken == pytest.approx([0.0, 1.0, 11.5, 12.5])
    assert engine.dropped == 0
    assert first.closed.is_set()
    with pytest.raises(SourceError, match=r"rtsp://cam was lost, and 3 attempts .* gone"):
        engine.take()
    assert second.closed.is_set()
    assert clock.waits == [0.5, 1.0, 2.0] + [0.5, 1.0, 2.0]
    assert engine.take() is None
    assert [(event.kind, event.attempt) for event in events] == [
        ("lost", 0), ("retry", 1), ("retry", 2), ("retry", 3), ("back", 3),
        ("lost", 0), ("retry", 1), ("retry", 2), ("retry", 3),
    ]  # fmt: skip
    assert [event.reason for event in events[:5]] == ["broke", "broke", "down", "down", ""]
    assert [event.seconds for event in events[:5]] == pytest.approx([1.0] * 4 + [11.5])
    assert events[4].gap == pytest.approx(10.5)
    assert (engine.losses.lost, engine.losses.retries, engine.losses.back) == (2, 6, 1)
    assert engine.losses.seconds == pytest.approx(10.5)


def test_times_ascend_over_a_loss_that_takes_no_time() -> None:
    class Frozen(FakeClock):
        def wait(self, seconds: float, stop: threading.Event) -> None:
            self.waits.append(seconds)

    feeds = [FakeFeed(3.0), FakeFeed(3.0), FakeFeed(1.0)]
    # Made lossless for the test, so that every frame is seen.
    engine = reader(*feeds, *["gone"] * 3, clock=Frozen())
    engine._state.mailbox.drop = False
    seconds, error = everything(engine)
    assert len(seconds) == 3
    assert all(a < b for a, b in pairwise(seconds))
    assert "lost" in error


def test_the_pauses_grow_to_a_bound() -> None:
    backoff = Backoff(retries=100)
    assert [backoff.seconds(i) for i in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert backoff.seconds(10_000) == 30.0


def test_no_retries_means_one_error() -> None:
    clock = FakeClock()
    seconds, error = everything(reader(FakeFeed(0.0, fault="broke"), retries=0, clock=clock))
    assert seconds == [0.0]
    assert "broke" in error
    assert clock.waits == []


def test_the_first_connection_is_not_tried_again() -> None:
    with pytest.raises(SourceError, match="down"):
        reader("down", FakeFeed(0.0))


def test_a_finite_feed_is_not_begun_again() -> None:
    engine = reader(FakeFeed(0.0, 1.0, live=False, fault="broke"), FakeFeed(0.0))
    assert everything(engine) == ([0.0, 1.0], "broke")


def test_paced_pictures_come_at_their_time() -> None:
    clock = FakeClock()
    feed = FakeFeed(0.0, 0.5, 2.0)
    engine = Reader(connecting(feed), fps=None, paced=True, clock=clock)
    everything(engine)
    assert clock.waits == [0.0, 0.5, 1.5]


def test_damage_is_added_up_over_connections() -> None:
    feeds = [FakeFeed(0.0), FakeFeed(0.0)]
    feeds[0].damaged, feeds[1].damaged = 2, 3
    engine = reader(*feeds, *["gone"] * 3)
    everything(engine)
    assert engine.damaged == 5


def test_close_wakes_a_consumer_that_waits() -> None:
    stuck = threading.Event()
    feed = FakeFeed(0.0, lambda: stuck.wait(PATIENCE_SECONDS), 1.0)
    source = Source(Reader(connecting(feed), fps=None))
    seen: list[float] = []
    consumer = threading.Thread(target=lambda: seen.extend(frame.seconds for frame in source))
    consumer.start()
    source.close()
    consumer.join(PATIENCE_SECONDS)
    assert not consumer.is_alive()
    assert seen in ([], [0.0])
    assert feed.cancelled.is_set()
    stuck.set()
    assert feed.closed.wait(PATIENCE_SECONDS)


def test_close_while_it_waits_to_connect_again() -> None:
    class Blocking(FakeClock):
        waiting = threading.Event()

        def wait(self, seconds: float, stop: threading.Event) -> None:
            self.waiting.set()
            assert stop.wait(PATIENCE_SECONDS)

    clock = Blocking()
    source = Source(reader(FakeFeed(0.0), FakeFeed(0.0), clock=clock))
    next(source)
    assert clock.waiting.wait(PATIENCE_SECONDS)
    source.close()
    assert list(source) == []


def test_a_forgotten_source_ends_its_thread() -> None:
    feed = FakeFeed(0.0, 1.0, live=False)
    source = Source(Reader(connecting(feed), fps=None))
    next(source)
    del source
    gc.collect()
    assert feed.closed.wait(PATIENCE_SECONDS)


def test_a_closed_mailbox_gives_nothing_and_takes_nothing() -> None:
    mailbox = Mailbox(drop=True)
    assert mailbox.put(picture(0.0))
    mailbox.close()
    assert mailbox.take() is None
    assert not mailbox.put(picture(1.0))
    assert not mailbox.wanted()
