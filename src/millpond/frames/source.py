"""What `open` returns: one iterator of frames over any kind of feed. Opens and decodes nothing itself."""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from millpond.frames.address import Kind
from millpond.frames.frame import Frame
from millpond.frames.sampling import Pending, sample


@dataclass(frozen=True)
class SourceInfo:
    """What is known about a source before its frames.

    Attributes:
        name: path or address, without credentials.
        kind: "file", "images", "url", "camera", "pipe" or "frames" (an iterable).
        live: frames come as they happen and are dropped rather than queued.
        codec: name of the video codec ("h264"); None where there is none.
        width, height: of the upright picture in pixels; None where not known before the first frame.
        fps: nominal frames per second of the source itself; None where it has none.
        duration: length in seconds as the container states it; None where not known.
    """

    name: str
    kind: Kind
    live: bool
    codec: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    duration: float | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened to the connection of a live source.

    Attributes:
        kind: "lost" (no more frames come), "retry" (an attempt to connect again begins) or "back" (a frame came again).
        seconds: stream time of the last frame before it; of the first one, for "back".
        attempt: attempts since the loss, this one included; 0 for "lost".
        gap: for "back", wall seconds without a frame; otherwise 0.
        reason: for "lost" and "retry", why; without credentials.
    """

    kind: Literal["lost", "retry", "back"]
    seconds: float
    attempt: int = 0
    gap: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Losses:
    """How often a live source was lost so far. Seconds are wall time without a frame, of losses that have ended."""

    lost: int = 0
    retries: int = 0
    back: int = 0
    seconds: float = 0.0


class Feed(Protocol):
    """A run of pictures from one opened thing. Used by one thread, but for `cancel`."""

    @property
    def info(self) -> SourceInfo:
        """What is known before the first picture."""

    @property
    def damaged(self) -> int:
        """Packets and pictures left out so far because they could not be decoded."""

    def __iter__(self) -> Iterator[Pending]:
        """Pictures with ascending times; SourceError after the last good one where the feed broke."""

    def cancel(self) -> None:
        """Make the iteration end soon. Any thread may call it; it only leaves a mark."""

    def close(self) -> None:
        """Let go of files and devices. Not while the iteration runs."""


class Engine(Protocol):
    """What drives a feed: in the consumer's thread, or in one of its own."""

    @property
    def info(self) -> SourceInfo: ...

    @property
    def dropped(self) -> int: ...

    @property
    def damaged(self) -> int: ...

    @property
    def losses(self) -> Losses: ...

    def take(self) -> Pending | None:
        """The next sampled picture; None at the end."""

    def cancel(self) -> None:
        """Make a running `take` return soon. Any thread, and a signal handler, may call it."""

    def close(self) -> None:
        """Let go of everything. Not while `take` runs."""


class Direct:
    """Drives a feed in the consumer's own thread: a frame is decoded when it is asked for, and nothing before."""

    dropped = 0
    losses = Losses()

    def __init__(self, feed: Feed, fps: float | None) -> None:
        self._feed = feed
        self._pictures = sample(feed, fps)
        self._end = weakref.finalize(self, feed.close)

    @property
    def info(self) -> SourceInfo:
        return self._feed.info

    @property
    def damaged(self) -> int:
        return self._feed.damaged

    def take(self) -> Pending | None:
        return next(self._pictures, None)

    def cancel(self) -> None:
        self._feed.cancel()

    def close(self) -> None:
        self._end()


class Source(Iterator[Frame]):
    """Frames of one source, in order, once: an iterator, and a context manager that closes it.

    Taking frames, leaving the loop and taking more later goes on where it stopped. At its end, after an error, or when it is
    forgotten, a source closes itself. `close` may be called from any thread: a loop that waits for a frame then ends.

    Raises (while iterating):
        SourceError: the source broke. Every frame before the fault has been given out by then and stays good.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._closed = False

    @property
    def info(self) -> SourceInfo:
        """What is known about the source; its name is safe to print."""
        return self._engine.info

    @property
    def dropped(self) -> int:
        """Sampled frames of a live source that a newer one replaced before they were taken. A file drops none."""
        return self._engine.dropped

    @property
    def damaged(self) -> int:
        """Packets and pictures left out so far because they could not be decoded or had no place in time."""
        return self._engine.damaged

    @property
    def losses(self) -> Losses:
        """How often a live source was lost and came back."""
        return self._engine.losses

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        frame = None
        try:
            with self._turn:
                picture = None if self._closed else self._engine.take()
                if picture is not None and not self._closed:
                    frame = Frame(picture.seconds, picture.render())
        finally:
            if frame is None:
                self._closed = True
            if self._closed:
                self._release()
        if frame is None:
            raise StopIteration
        return frame

    def close(self) -> None:
        """End the source and let go of it; a second call does nothing."""
        self._closed = True
        self._engine.cancel()
        self._release()

    def _release(self) -> None:
        # Whoever is taking a frame now, in whichever thread, comes here when it is done.
        if self._turn.acquire(blocking=False):
            try:
                self._engine.close()
            finally:
                self._turn.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Source {self.info.kind} {self.info.name}>"
