"""What is done with one session, in order; with many of them, side by side. Knows neither sessions nor models.

Most of it is done by whoever asks for it, in a thread of its own, once its turn has come (`turn`). What was only left here to be done
(`put`) is done by a pool of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from millpond.errors import MillpondError


class Job:
    """Something that is done in its turn.

    Args:
        run: does it, in a thread of the pool, and raises nothing; None: whoever waits for its turn does it itself.
    """

    def __init__(self, run: Callable[[], Any] | None = None) -> None:
        self.run = run
        self.called = threading.Event()  # its turn has come, or will not come any more


class Lane:
    """The jobs of one session, in order. Changed only with the pool's lock held."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.current: Job | None = None


class Pool:
    """Threads that do what was left to be done, first come first served; begun when they are needed.

    Args:
        threads: most of them. idle: called by a thread behind each job.

    Attributes:
        lock: held while a lane is changed; notified whenever one was.
    """

    def __init__(self, threads: int, idle: Callable[[], None]) -> None:
        self._most, self._idle = threads, idle
        lock = threading.Lock()
        self.lock, self._work = threading.Condition(lock), threading.Condition(lock)
        self._ready: deque[Lane] = deque()
        self._waiting: set[Job] = set()  # whose threads wait for their turn
        self._threads: list[threading.Thread] = []
        self._free = 0
        self._closed = False

    def put(self, lane: Lane, job: Job) -> None:
        """Line a job up, for who holds the lock.

        Raises:
            MillpondError: the pool is closed.
        """
        if self._closed:
            raise MillpondError("the engine is closed")
        lane.jobs.append(job)
        self._go_on(lane)

    def drop(self, lane: Lane, job: Job) -> None:
        """Take a job that has not begun out of its lane, for who holds the lock."""
        lane.jobs.remove(job)

    @contextmanager
    def turn(
        self, lane: Lane, waiting: Callable[[], None] | None = None, seconds: float | None = None
    ) -> Iterator[Callable[[], None]]:
        """Wait for this thread's turn in a lane, and have it within a `with` block, or until what it gives is called.

        Args:
            waiting: called once it has its place. seconds: to wait at most.

        Raises:
            TimeoutError: it had to wait longer. MillpondError: the pool was closed.
        """
        job = Job()
        try:
            with self.lock:
                self._waiting.add(job)
                self.put(lane, job)
            if waiting is not None:
                waiting()
            if not job.called.wait(seconds):
                raise TimeoutError
            if lane.current is not job:
                raise MillpondError("the engine was closed meanwhile")
            yield lambda: self._end(lane, job)
        finally:
            self._end(lane, job)

    def close(self) -> None:
        """End all threads, behind the jobs that run; what waits is not done any more."""
        with self.lock:
            self._closed = True
            self._ready.clear()
            for job in self._waiting:
                job.called.set()
            self.lock.notify_all()
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # where an engine is collected
                thread.join()
        self._threads.clear()

    def _end(self, lane: Lane, job: Job) -> None:
        """A job has ended, or is given up before its turn."""
        with self.lock:
            self._waiting.discard(job)
            if lane.current is job:
                lane.current = None
                self._go_on(lane)
            elif job in lane.jobs:
                lane.jobs.remove(job)

    def _go_on(self, lane: Lane) -> None:
        if lane.current is not None or not lane.jobs or self._closed:
            return
        job = lane.current = lane.jobs.popleft()
        if job.run is None:
            job.called.set()
            return
        self._ready.append(lane)
        if len(self._ready) <= self._free:
            self._work.notify()
        elif len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name="millpond-engine", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while True:
            with self.lock:
                self._free += 1
                self._work.wait_for(lambda: self._ready or self._closed)
                self._free -= 1
                if self._closed:
                    return
                lane = self._ready.popleft()
                job = lane.current
                assert job is not None
                assert job.run is not None
            job.run()
            self._idle()
            self._end(lane, job)
            del lane, job
