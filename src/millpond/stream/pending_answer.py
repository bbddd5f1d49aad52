"""An answer that is being generated in a thread of its own, whatever its reader does. Knows nothing about streams or models."""

from __future__ import annotations

import atexit
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator

from millpond.answer import Answer
from millpond.errors import MillpondError

Answering = Callable[[Callable[[], None], Callable[[], None]], Generator[str, None, Answer]]
"""Generates an answer in pieces. Calls the first when it has to wait for its turn, the second when that begins and nothing has been done."""


class PendingAnswer:
    """An answer that is being generated, from `millpond.Session.begin`.

    Iterate to read its pieces of text as they come, from the first on, as often as you like; or wait for its `result`. It never waits
    for its reader. Once nobody holds it any more it is cancelled.

    Args:
        answering: begun in a thread of its own; this returns when it has its turn, or waits for it in a queue.
    """

    def __init__(self, answering: Answering) -> None:
        self._work = _Work(answering)
        weakref.finalize(self, self._work.abandon).atexit = False
        try:
            self._work.start()
        except BaseException:
            self._work.cancel()
            raise

    def __iter__(self) -> Iterator[str]:
        """The pieces of its text, each when it is there.

        Raises:
            MillpondError: it was cancelled. Whatever else ended it early is raised too, behind the pieces that there are.
        """
        at = 0
        while (piece := self._work.piece(at)) is not None:
            at += 1
            yield piece
        self._work.answer()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._work.done

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, for so many seconds at most; returns whether it has."""
        return self._work.wait(timeout)

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer, once it is there.

        Raises:
            TimeoutError: it is not there after `timeout` seconds; it goes on.
            MillpondError: it was cancelled. Whatever else ended it early, as for `Session.ask`.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"no answer within {timeout:g} s")
        return self._work.answer()

    def cancel(self) -> None:
        """End it now, or with the token that is being generated; the stream is as if it had not been asked. Does not wait for that."""
        self._work.cancel()


class _Work:
    """What the thread and whoever holds the answer have in common; the thread must not keep the `PendingAnswer` itself alive."""

    def __init__(self, answering: Answering) -> None:
        self._answering: Answering | None = answering
        self._changed = threading.Condition()
        self._pieces: list[str] = []  # never more than the turn has slots for tokens
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._placed = self._begun = self._cancelled = False
        self.done = False

    def start(self) -> None:
        """Return when the turn has begun, or waits for others, or has failed."""
        threading.Thread(target=self._run, name="millpond-answer", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._placed or self.done)

    def piece(self, at: int) -> str | None:
        """A piece, once it is there; None when there are no more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._pieces) > at or self.done)
            return self._pieces[at] if len(self._pieces) > at else None

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def answer(self) -> Answer:
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            if not self._begun and not self.done:
                # It has touched nothing yet, and leaves the queue when it comes to the front.
                self._end(error=_cancelled())

    def abandon(self) -> None:
        """Cancel from a finalizer, which may run in any thread while it holds any lock."""
        self._cancelled = True

    def _place(self) -> None:
        with self._changed:
            self._placed = True
            self._changed.notify_all()

    def _begin(self) -> None:
        with self._changed:
            if self._cancelled:
                raise _cancelled()
            self._begun = True
        self._place()

    def _end(self, *, answer: Answer | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            if not self.done:
                self._answer, self._error, self.done = answer, error, True
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            _running[threading.current_thread()] = self
            try:
                assert self._answering is not None
                pieces, self._answering = self._answering(self._place, self._begin), None
                self._end(answer=self._generate(pieces))
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # what they worked on goes
                self._end(error=error)
        finally:
            # Whatever happened, nobody waits for ever.
            self._end(error=MillpondError("the answer ended before its time"))
            _running.pop(threading.current_thread(), None)

    def _generate(self, pieces: Generator[str, None, Answer]) -> Answer:
        try:
            while not self._cancelled:
                piece = next(pieces)
                if piece:
                    with self._changed:
                        self._pieces.append(piece)
                        self._changed.notify_all()
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        finally:
            pieces.close()
        raise _cancelled()


def _cancelled() -> MillpondError:
    return MillpondError("the answer was cancelled")


_running: dict[threading.Thread, _Work] = {}


@atexit.register
def _end_all() -> None:
    """No thread may be inside the model when the interpreter goes."""
    running = list(_running.items())
    for _, work in running:
        work.cancel()
    for thread, _ in running:
        thread.join()
