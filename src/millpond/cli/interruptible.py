"""A source that can be stopped and cut into segments, so that a session can answer between two of them.

A `feed` goes on until the source it was given ends. This source stands between: it waits for the real source in a thread
of its own, and ends a segment when a moment of the stream is reached or when it is stopped, also while the source itself is silent. A frame is taken when it is wanted and not before, so that a live source can go on
replacing it by a newer one. Knows nothing about sessions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_POLL_SECONDS = 0.05
# Stream times are kept in microseconds; a moment written with three decimals means the frame at that millisecond.
_TOLERANCE_SECONDS = 0.0005


class _End(NamedTuple):
    """What the reading thread leaves behind the last frame: nothing, or the error that ended the source."""

    error: BaseException | None


class InterruptibleSource:
    """Iterate it to get the frames of one segment; iterate again for the next.

    Args:
        source: an iterable of frames with `.seconds` and, where frames can be dropped, `.dropped`.
        tick: called between frames and while waiting for one; for a progress line.
        look: shown every frame before it is handed out.
        seconds: stream time that was reached before; None for a stream that begins.

    Attributes:
        dropped: frames the source has dropped, as of the last segment; a session adds up the differences.
        seconds: stream time of the last frame handed out, or that was reached before; None before the first.
        until_seconds: until when that frame stands: as long as the one before it did.
        ended: the source has no more frames.
        stopped: `stop` was called.
    """

    def __init__(
        self,
        source: Any,
        *,
        tick: Callable[[], None] = lambda: None,
        look: Callable[[Any], None] = lambda frame: None,
        seconds: float | None = None,
    ) -> None:
        self._source = source
        self._tick, self._look = tick, look
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._next: Any = None
        self._limit: float | None = None
        self._wanted = threading.Semaphore(0)
        self._waiting = False
        self._closed = False
        self.dropped = 0
        self.seconds = seconds
        self.until_seconds = seconds or 0.0
        self.ended = False
        self.stopped = False
        self.reached = False
        self._thread = threading.Thread(target=self._read, name="millpond-source", daemon=True)
        self._thread.start()

    def until(self, seconds: float | None) -> InterruptibleSource:
        """Let the next segments end at a moment of the stream: after all frames up to it. None lifts the limit."""
        self._limit, self.reached = seconds, False
        return self

    def __iter__(self) -> Iterator[Any]:
        while not self.stopped and not self.ended:
            self._tick()
            if self._next is None:
                if not self._waiting:
                    self._waiting = True
                    self._wanted.release()
                try:
                    self._next = self._arrived.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                self._waiting = False
            if isinstance(self._next, _End):
                self.ended = True
                self._count()
                if self._next.error is not None:
                    raise self._next.error
                return
            frame = self._next
            if self._limit is not None and frame.seconds > self._limit + _TOLERANCE_SECONDS:
                self.reached = True
                return
            self._next = None
            self._count()
            self.until_seconds = frame.seconds + (0.0 if self.seconds is None else frame.seconds - self.seconds)
            self.seconds = frame.seconds
            self._look(frame)
            yield frame
            if self._limit is not None and frame.seconds >= self._limit - _TOLERANCE_SECONDS:
                self.reached = True
                return

    def stop(self) -> None:
        """End the segment and all further ones. Safe in a signal handler."""
        self.stopped = True

    def close(self) -> None:
        """Stop, and let go of the source."""
        self.stop()
        self._closed = True
        self._wanted.release()
        if hasattr(self._source, "close"):
            self._source.close()
        # A source that is stuck in a system call is left to its own time-out; the thread does not keep the process alive.
        self._thread.join(timeout=1.0)

    def _count(self) -> None:
        self.dropped = getattr(self._source, "dropped", 0)

    def _read(self) -> None:
        """The reading thread: one frame each time one is wanted, then the end."""
        end = _End(None)
        try:
            frames = iter(self._source)
            while True:
                self._wanted.acquire()
                if self._closed:
                    return
                frame = next(frames, None)
                if frame is None:
                    break
                self._arrived.put(frame)
        except BaseException as error:
            end = _End(error)
        self._arrived.put(end)
