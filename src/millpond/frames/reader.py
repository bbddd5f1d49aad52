"""A thread that reads a stream while the consumer thinks: drops to the latest frame, and connects again when it is lost.

Knows nothing about codecs or addresses: `connect` makes a feed, and the clock can be replaced.
"""

import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from millpond.errors import SourceError
from millpond.frames.sampling import Pending, sample
from millpond.frames.source import Event, Feed, Losses, SourceInfo

# After a second the consumer goes its way; a thread that is stuck in a system call ends by its own time-out.
_JOIN_SECONDS = 1.0
_MIN_STEP_SECONDS = 1e-3


class Clock(Protocol):
    """Wall time, for live streams only."""

    def now(self) -> float:
        """Seconds from any origin, never backward."""

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Return after so many seconds, or as soon as `stop` is set."""


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(max(0.0, seconds))


@dataclass(frozen=True)
class Backoff:
    """Waiting times between attempts to connect: first, twice that, ... up to most.

    Attributes:
        retries: attempts in a row before giving up; a frame that arrives begins the count anew.
        first, most: seconds.
    """

    retries: int
    first: float = 0.5
    most: float = 30.0

    def seconds(self, attempt: int) -> float:
        """Before attempt 0, 1, ..."""
        return float(min(self.first * 2.0 ** min(attempt, 60), self.most))


class Mailbox:
    """Room for one picture between the reading thread and the consumer.

    Args:
        drop: a new picture replaces one that was not taken, and `dropped` counts it; otherwise the reader waits.
    """

    def __init__(self, *, drop: bool) -> None:
        self.drop = drop
        self.dropped = 0
        self._picture: Pending | None = None
        self._wanted = False
        self._ended = False
        self._fault: BaseException | None = None
        # Re-entrant: a signal handler may close the mailbox while its own thread is inside.
        self._changed = threading.Condition(threading.RLock())

    def wanted(self) -> bool:
        """Wait for the first `take`; False when it will not come."""
        with self._changed:
            while not self._wanted and not self._ended:
                self._changed.wait()
            return not self._ended

    def put(self, picture: Pending) -> bool:
        """Leave a picture; False when nobody will take it any more."""
        with self._changed:
            while self._picture is not None and not self.drop and not self._ended:
                self._changed.wait()
            if self._ended:
                return False
            self.dropped += self._picture is not None
            self._picture = picture
            self._changed.notify_all()
            return True

    def finish(self, fault: BaseException | None) -> None:
        """No more pictures. One that waits is still handed out, and the fault after it."""
        with self._changed:
            if not self._ended:
                self._ended, self._fault = True, fault
            self._changed.notify_all()

    def close(self) -> None:
        """Throw away what waits, and wake everybody."""
        with self._changed:
            self._ended, self._picture, self._fault = True, None, None
            self._changed.notify_all()

    def take(self) -> Pending | None:
        """The next picture, waiting for it; None at the end; raises the fault once."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            while self._picture is None and not self._ended:
                self._changed.wait()
            picture, self._picture = self._picture, None
            fault = None
            if picture is None:
                fault, self._fault = self._fault, None
            self._changed.notify_all()
        if fault is not None:
            raise fault
        return picture


class Reader:
    """Drives a feed in a thread of its own. An `Engine`.

    The thread connects at once, and reads from the first `take` on. Times go on over a loss of the stream: by the wall time
    that passed between the last frame before and the first one after it.

    Args:
        connect: opens the stream; raises SourceError. Called in the thread, and again after every loss.
        fps: sampling, by stream time.
        backoff: how to connect again; None ends with the feed.
        paced: give out pictures no sooner than their time, so that a file plays like a camera.
        on_event: told of every loss, attempt and return, in the thread.

    Raises:
        SourceError: the first attempt to connect failed.
    """

    def __init__(
        self,
        connect: Callable[[], Feed],
        *,
        fps: float | None,
        backoff: Backoff | None = None,
        paced: bool = False,
        clock: Clock | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._state = _State(connect, fps, backoff, paced, clock or SystemClock(), on_event or (lambda event: None))
        # The thread holds the state and not the reader, so that a reader nobody holds any more ends its thread.
        self._thread = threading.Thread(target=self._state.run, name="millpond-frames", daemon=True)
        self._end = weakref.finalize(self, self._state.cancel)
        self._thread.start()
        try:
            self.info: SourceInfo = self._state.opened()
        except BaseException:
            self.close()
            raise

    @property
    def dropped(self) -> int:
        return self._state.mailbox.dropped

    @property
    def damaged(self) -> int:
        return self._state.damaged

    @property
    def losses(self) -> Losses:
        return self._state.losses

    def take(self) -> Pending | None:
        return self._state.mailbox.take()

    def cancel(self) -> None:
        self._end()

    def close(self) -> None:
        self.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)


@dataclass(eq=False)
class _State:
    """What the thread works on, and the thread itself in `run`."""

    connect: Callable[[], Feed]
    fps: float | None
    backoff: Backoff | None
    paced: bool
    clock: Clock
    on_event: Callable[[Event], None]
    losses: Losses = field(default_factory=Losses)
    _stop: threading.Event = field(default_factory=threading.Event)
    _ready: threading.Event = field(default_factory=threading.Event)
    _feed: Feed | None = None
    _info: SourceInfo | None = None
    _damaged: int = 0

    def __post_init__(self) -> None:
        self.mailbox = Mailbox(drop=False)

    @property
    def damaged(self) -> int:
        feed = self._feed
        return self._damaged + (0 if feed is None else feed.damaged)

    def opened(self) -> SourceInfo:
        """Wait for the first connection; raises its fault."""
        self._ready.wait()
        if self._info is None:
            self.mailbox.take()
            raise SourceError("closed while it was opened")
        return self._info

    def cancel(self) -> None:
        self._stop.set()
        self.mailbox.close()
        feed = self._feed
        if feed is not None:
            feed.cancel()

    def run(self) -> None:
        fault: BaseException | None = None
        try:
            feed = self._attach()
            self._info = feed.info
            self.mailbox.drop = self._info.live
            if not self._info.live:
                self.backoff = None  # a file that broke would begin again at its start
            self._ready.set()
            if self.mailbox.wanted():
                with closing(self._pictures(feed)) as pictures:
                    for picture in sample(pictures, self.fps):
                        if not self.mailbox.put(picture):
                            break
        except BaseException as error:  # raised again where the consumer takes
            fault = error
        finally:
            self._detach()
            self.mailbox.finish(fault)
            self._ready.set()

    def _attach(self) -> Feed:
        feed = self._feed = self.connect()
        if self._stop.is_set():  # cancelled meanwhile, when there was nothing yet to cancel
            feed.cancel()
        return feed

    def _detach(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            self._damaged += feed.damaged
            feed.close()

    def _pictures(self, first: Feed) -> Generator[Pending, None, None]:
        """Pictures of one connection after another, on one ascending clock."""
        feed: Feed | None = first
        last: float | None = None
        arrived, attempt = self.clock.now(), 0
        lost = False
        while not self._stop.is_set():
            reason = "the stream ended"
            try:
                feed = feed or self._attach()
                begun, shift = self.clock.now(), None
                for picture in feed:
                    now = self.clock.now()
                    if shift is None:
                        gap = max(now - arrived, _MIN_STEP_SECONDS)
                        shift = 0.0 if last is None else last + gap - picture.seconds
                    seconds = picture.seconds + shift
                    if self.paced:
                        self.clock.wait(begun + seconds - now, self._stop)
                    if self._stop.is_set():
                        return
                    if lost:
                        lost = False
                        self._tell(Event("back", seconds, attempt, now - arrived))
                    last, arrived, attempt = seconds, self.clock.now(), 0
                    yield Pending(seconds, picture.render)
            except SourceError as error:
                if self.backoff is None:
                    raise
                reason = str(error)
            finally:
                feed = None
                self._detach()
            if self.backoff is None or self._stop.is_set():
                return
            if not lost:
                lost = True
                self._tell(Event("lost", last or 0.0, reason=reason))
            if attempt >= self.backoff.retries:
                raise SourceError(f"{self._name()} was lost, and {attempt} attempts to connect again failed: {reason}")
            self.clock.wait(self.backoff.seconds(attempt), self._stop)
            attempt += 1
            if not self._stop.is_set():
                self._tell(Event("retry", last or 0.0, attempt, reason=reason))

    def _tell(self, event: Event) -> None:
        known = self.losses
        if event.kind == "lost":
            self.losses = replace(known, lost=known.lost + 1)
        elif event.kind == "retry":
            self.losses = replace(known, retries=known.retries + 1)
        else:
            self.losses = replace(known, back=known.back + 1, seconds=known.seconds + event.gap)
        self.on_event(event)

    def _name(self) -> str:
        return "the stream" if self._info is None else self._info.name
