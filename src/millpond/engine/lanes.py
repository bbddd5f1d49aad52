"""Jobs of many sessions on one pool of threads: those of a session one behind the other, those of different ones side by side.

Knows neither sessions nor models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from millpond.errors import MillpondError


class Job:
    """Something to do in its turn.

    Args:
        run: does it. long: it answers a question: of these only so many run at once that threads stay free for what is short.

    Attributes:
        outcome: what `run` gives, once it has. Cancelled before its turn, it is passed over.
    """

    def __init__(self, run: Callable[[], Any], *, long: bool = False) -> None:
        self.run, self.long = run, long
        self.outcome: Future[Any] = Future()


class Lane:
    """The jobs of one session, in order. Changed only with the pool's lock held."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.running = False


class Pool:
    """Threads that do the jobs of all lanes, first come first served; begun when they are needed.

    Args:
        threads: most of them. idle: called by a thread behind each job.
    """

    def __init__(self, threads: int, idle: Callable[[], None]) -> None:
        self._most, self._idle = threads, idle
        self._most_long = max(1, threads * 3 // 4)
        self.lock = threading.Condition(threading.Lock())
        self._ready: deque[Lane] = deque()
        self._threads: list[threading.Thread] = []
        self._free = self._long = 0
        self._closed = False

    def put(self, lane: Lane, job: Job) -> None:
        """Line a job up.

        Raises:
            MillpondError: the pool is closed.
        """
        with self.lock:
            self.put_locked(lane, job)

    def put_locked(self, lane: Lane, job: Job) -> None:
        """The same for who holds the lock."""
        if self._closed:
            raise MillpondError("the engine is closed")
        lane.jobs.append(job)
        if not lane.running and len(lane.jobs) == 1:
            self._line_up(lane)

    def close(self) -> None:
        """End all threads, behind the jobs that run; jobs that wait are cancelled."""
        with self.lock:
            self._closed = True
            for lane in self._ready:
                self._drop(lane)
            self._ready.clear()
            self.lock.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _drop(self, lane: Lane) -> None:
        for job in lane.jobs:
            job.outcome.cancel()
        lane.jobs.clear()

    def _line_up(self, lane: Lane) -> None:
        self._ready.append(lane)
        if self._free:
            self.lock.notify()
        elif len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="millpond-engine", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _take(self) -> tuple[Lane, Job] | None:
        """The next job, when there is one; None at the end."""
        while not self._closed:
            for index, lane in enumerate(self._ready):
                if not lane.jobs[0].long or self._long < self._most_long:
                    del self._ready[index]
                    lane.running = True
                    job = lane.jobs.popleft()
                    self._long += job.long
                    return lane, job
            self._free += 1
            self.lock.wait()
            self._free -= 1
        return None

    def _work(self) -> None:
        while True:
            with self.lock:
                taken = self._take()
            if taken is None:
                return
            lane, job = taken
            if job.outcome.set_running_or_notify_cancel():
                try:
                    result = job.run()
                except BaseException as error:
                    job.outcome.set_exception(error)
                    del error
                else:
                    job.outcome.set_result(result)
                    del result
            self._idle()
            with self.lock:
                lane.running = False
                self._long -= job.long
                if self._closed:
                    self._drop(lane)
                elif lane.jobs:
                    self._line_up(lane)
                if job.long:
                    self.lock.notify()  # one that had to wait for its like
            del taken, lane, job
