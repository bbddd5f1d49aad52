"""Frames that were offered and wait for their session: so many a session, so many bytes for all, counted when they are dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from millpond.engine.lanes import Job, Lane, Pool
from millpond.errors import BudgetError, MillpondError
from millpond.frames import Frame
from millpond.memory.budget import format_bytes


class _Waiting(Job):
    """One frame that waits for its turn; it counts until it is taken."""

    def __init__(self, frame: Frame, queue: Queue, take: Callable[[Frame], None]) -> None:
        super().__init__(lambda: queue.run(self, take))
        self.frame = Frame(frame.seconds, np.array(frame.pixels))

    @property
    def bytes(self) -> int:
        return self.frame.pixels.nbytes


class Queue:
    """One session's waiting frames, oldest first.

    Attributes:
        lane: of the session. frames: those that wait. dropped: those that a newer one replaced, or that found no room.
    """

    def __init__(self, backlog: Backlog, lane: Lane) -> None:
        self._backlog, self.lane = backlog, lane
        self.frames: deque[_Waiting] = deque()
        self.dropped = 0
        self.closed = False

    def run(self, waiting: _Waiting, take: Callable[[Frame], None]) -> None:
        """Hand a frame over, whose turn it is."""
        self._backlog.remove(self, waiting)
        take(waiting.frame)


class Backlog:
    """The waiting frames of all sessions. Their pixels are copies, and count.

    Args:
        pool: takes them. most_frames: of one session. most_bytes: of all.

    Attributes:
        bytes: held now.
    """

    def __init__(self, pool: Pool, most_frames: int, most_bytes: int) -> None:
        self._pool, self._most_frames, self._most_bytes = pool, most_frames, most_bytes
        self.bytes = 0
        self._queues = 0

    def open(self, lane: Lane) -> Queue:
        """A queue for one more session."""
        with self._pool.lock:
            self._queues += 1
        return Queue(self, lane)

    def close(self, queue: Queue) -> None:
        """Drop what waits; nothing more is let in."""
        with self._pool.lock:
            if not queue.closed:
                queue.closed = True
                self._queues -= 1
                while self._drop(queue):
                    pass

    def put(self, queue: Queue, frame: Frame, take: Callable[[Frame], None], wait: float | None) -> bool:
        """Queue a frame, for `take` in its turn; whether that went without dropping one.

        Args:
            wait: seconds to wait for room; None: as long as it takes. Without room the oldest of the session's frames are dropped.

        Raises:
            BudgetError: it is larger than what all may hold. MillpondError: the queue is closed.
        """
        size = frame.pixels.nbytes
        if size > self._most_bytes:
            raise BudgetError(
                f"a frame of {format_bytes(size)} is larger than the engine's queue_memory, {format_bytes(self._most_bytes)}"
            )
        with self._pool.lock:
            self._pool.lock.wait_for(lambda: queue.closed or self._fits(queue, size), wait)
            if queue.closed:
                raise MillpondError("the session is closed")
            dropped = queue.dropped
            while not self._fits(queue, size):
                if not self._drop(queue):
                    queue.dropped += 1  # others hold all there is
                    return False
            waiting = _Waiting(frame, queue, take)
            queue.frames.append(waiting)
            self.bytes += size
            self._pool.put(queue.lane, waiting)
            return queue.dropped == dropped

    def remove(self, queue: Queue, waiting: _Waiting) -> None:
        """A frame is no longer waiting."""
        with self._pool.lock:
            queue.frames.remove(waiting)
            self.bytes -= waiting.bytes
            self._pool.lock.notify_all()

    def _fits(self, queue: Queue, size: int) -> bool:
        share = self._most_bytes // max(1, self._queues)
        own = sum(waiting.bytes for waiting in queue.frames)
        # The first frame may take more than a session's share, so that large ones pass at all.
        within = not queue.frames or (len(queue.frames) < self._most_frames and own + size <= share)
        return within and self.bytes + size <= self._most_bytes

    def _drop(self, queue: Queue) -> bool:
        """Drop the oldest frame whose turn has not come; whether there was one."""
        for waiting in queue.frames:
            if waiting in queue.lane.jobs:
                self._pool.drop(queue.lane, waiting)
                queue.frames.remove(waiting)
                self.bytes -= waiting.bytes
                queue.dropped += 1
                self._pool.lock.notify_all()
                return True
        return False
