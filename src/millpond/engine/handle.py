"""One session of an engine, as its user holds it: what a `millpond.Session` has, in order, whether it is in memory or in its file."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

from millpond import frames
from millpond.answer import Answer, LayerMemory, Usage
from millpond.config import SessionConfig
from millpond.engine.backlog import Backlog
from millpond.engine.lanes import Lane, Pool
from millpond.engine.residency import Residency
from millpond.engine.resident import Resident
from millpond.engine.scheduler import Scheduler
from millpond.errors import MillpondError, SourceError
from millpond.frames import Frame
from millpond.memory.budget import Budget
from millpond.standing import OnAnswer, StandingQuestion
from millpond.stream.pending_answer import Answering, PendingAnswer


@dataclass(frozen=True)
class Status:
    """How one session of an engine stands.

    Attributes:
        name: of the session. in_memory: False while it is hibernated.
        bytes: that it holds of the engine's; 0 while it is hibernated. hibernations: how often it was.
        frames_waiting: offered and not yet taken. frames_dropped: offered and dropped, for want of room.
        faults: offered frames that could not be taken; what had been seen stays. last_fault: what the latest of them said.
    """

    name: str
    in_memory: bool
    bytes: int
    hibernations: int
    frames_waiting: int
    frames_dropped: int
    faults: int
    last_fault: str

    def to_dict(self) -> dict[str, Any]:
        """The same names as plain values."""
        return asdict(self)


class EngineSession:
    """A session of an engine, from `Engine.open`. Any thread may use it.

    What it is asked to do is done in that order: a question sees every frame that was given before it. What goes wrong in one session is
    told to whoever asked for it, and harms no other.
    """

    def __init__(self, shared: Shared, resident: Resident) -> None:
        self._shared, self._resident = shared, resident
        self._lane = Lane()
        self._queue = shared.backlog.open(self._lane)
        self._faults, self._fault = 0, ""

    @property
    def name(self) -> str:
        """What it is called in its engine."""
        return self._resident.name

    # --- watching -----------------------------------------------------------------------------------------------

    def feed(self, source: Frame | Iterable[Any]) -> int:
        """Take in one frame, a list of frames, or everything a source gives, in this thread; see `millpond.Session.feed`.

        A slow source holds up this call only. Until it ends the session stays in memory.

        Raises:
            BudgetError: as for a `Session`; or it is hibernated, and no room came free in time.
            SourceError, ModelError: as for a `Session`. MillpondError: it was closed.
        """
        residency, resident, use, given = self._shared.residency, self._resident, object(), source
        try:
            with self._turn():
                session = residency.enter(resident, use)
            if not isinstance(source, Frame) and not hasattr(source, "dropped"):
                given = frames.open(source)
            if isinstance(given, frames.Source):
                residency.watch(resident, given)
            return session.feed(given)
        finally:
            if isinstance(given, frames.Source):
                residency.unwatch(resident, given)
                if given is not source:
                    given.close()
            residency.leave(resident, use)
            self._shared.scheduler.leave()

    def offer(self, frame: Frame, *, wait: float = 0.0) -> bool:
        """Leave a frame to be taken in by the engine's threads, and return at once; its pixels are copied.

        Where as many wait as may (`Engine`'s `queue_frames` and `queue_memory`), the oldest of them are dropped, and counted.

        Args:
            wait: seconds to wait for room before that.

        Returns:
            Whether it was queued without dropping any.

        Raises:
            SourceError: it is no frame. BudgetError: it is larger than all that may wait. MillpondError: the session is closed.
        """
        if not isinstance(frame, Frame):
            raise SourceError(f"offer a millpond.frames.Frame, not {type(frame).__name__}")
        return self._shared.backlog.put(self._queue, frame, self._take, wait)

    def _take(self, frame: Frame) -> None:
        """Take an offered frame in; what goes wrong is counted, for the one who offered it has gone."""
        try:
            with self._shared.residency.used(self._resident) as session:
                session.feed(frame)
        except Exception as error:
            self._faults, self._fault = self._faults + 1, str(error)

    # --- asking -------------------------------------------------------------------------------------------------

    def ask(
        self, question: str, *, max_new_tokens: int = 128, remember: bool = False, timeout: float | None = None
    ) -> Answer:
        """Answer a question about the stream so far, in this thread; see `millpond.Session.ask`.

        Args:
            timeout: seconds in which the answer must be complete, from now on.

        Raises:
            MillpondError: the answer took longer, and the stream is as it was before; or the session was closed; or as for a `Session`.
            BudgetError, ModelError: as for a `Session`; or it is hibernated, and no room came free in time.
        """
        pieces = self._answering(question, max_new_tokens, remember, timeout)(_nothing, _nothing)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                answer: Answer = done.value
                return answer

    def begin(
        self, question: str, *, max_new_tokens: int = 128, remember: bool = False, timeout: float | None = None
    ) -> PendingAnswer:
        """Begin to answer like `ask`, in a thread of its own, and return at once; see `millpond.Session.begin`.

        What goes wrong is raised by what this returns.
        """
        return PendingAnswer(self._answering(question, max_new_tokens, remember, timeout))

    def _answering(self, question: str, limit: int, remember: bool, timeout: float | None) -> Answering:
        """What generates the answer in its turn; frames behind it in the lane go on as soon as it has begun."""
        deadline = None if timeout is None else monotonic() + timeout

        def answering(waiting: Callable[[], None], begins: Callable[[], None]) -> Generator[str, None, Answer]:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            with (
                self._shared.pool.turn(self._lane, waiting, left) as end,
                self._shared.residency.used(self._resident) as session,
                self._shared.scheduler.asking(),
            ):

                def begun() -> None:
                    begins()
                    end()

                pieces = session.answering(question, max_new_tokens=limit, remember=remember)(_nothing, begun)
                try:
                    while deadline is None or monotonic() < deadline:
                        try:
                            piece = next(pieces)
                        except StopIteration as done:
                            answer: Answer = done.value
                            return answer
                        yield piece
                finally:
                    pieces.close()
            raise TimeoutError

        def in_time(waiting: Callable[[], None], begins: Callable[[], None]) -> Generator[str, None, Answer]:
            try:
                return (yield from answering(waiting, begins))
            except TimeoutError:
                raise MillpondError(f"the answer took longer than {timeout:g} s") from None

        return in_time

    def every(
        self, seconds: float, question: str, *, max_new_tokens: int = 128, on_answer: OnAnswer | None = None
    ) -> StandingQuestion:
        """Ask a question again and again on stream time, in whatever thread takes the frames in; see `millpond.Session.every`.

        It goes on when the session has been hibernated. A `fork` has none.
        """
        with self._turn(), self._shared.residency.used(self._resident) as session:
            return session.every(seconds, question, max_new_tokens=max_new_tokens, on_answer=on_answer)

    # --- the session itself -------------------------------------------------------------------------------------

    def fork(self, name: str) -> EngineSession:
        """A second session on a copy of the memory, with as many bytes.

        Raises:
            BudgetError: there is no room. MillpondError: there is a session of that name.
        """
        with self._turn():
            resident = self._resident
            other = self._shared.resident(name, resident.config, resident.weight, resident.least)
            self._shared.residency.fork(resident, other)
            return self._shared.add(other)

    def resize(self, budget: str | int) -> None:
        """Change the most bytes that it takes of the engine's, and has now; others make room as for an arrival.

        Raises:
            BudgetError: there is no room for more; or less than what works. Nothing changes.
        """
        with self._turn():
            self._shared.residency.resize(self._resident, int(Budget(budget)))

    def hibernate(self) -> None:
        """Write it to its file and give its bytes back; the next frame or question brings it back.

        Raises:
            SnapshotError: it cannot be written; it stays in memory.
        """
        with self._turn():
            self._shared.residency.hibernate(self._resident)

    def close(self) -> None:
        """End it: frames that wait are dropped, what has begun is done, its bytes and its file go. A second call does nothing."""
        self._shared.backlog.close(self._queue)
        self._shared.residency.close(self._resident)
        self._shared.remove(self)

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Bytes, tokens, frames and seconds so far; of a hibernated one, as it went to its file."""
        return self._shared.residency.usage(self._resident)

    @property
    def status(self) -> Status:
        """How it stands in its engine."""
        resident = self._resident
        return Status(
            name=resident.name,
            in_memory=resident.session is not None,
            bytes=self._shared.residency.grants.of(resident.name),
            hibernations=resident.hibernations,
            frames_waiting=len(self._queue.frames),
            frames_dropped=self._queue.dropped,
            faults=self._faults,
            last_fault=self._fault,
        )

    def memory(self) -> tuple[LayerMemory, ...]:
        """What is remembered, as for a `Session`."""
        with self._turn(), self._shared.residency.used(self._resident) as session:
            return session.memory()

    def _turn(self) -> AbstractContextManager[Callable[[], None]]:
        return self._shared.pool.turn(self._lane)


class Shared:
    """What the sessions of an engine share; it lives as long as the engine or one of them.

    Args:
        residency, scheduler, pool, backlog: the engine's. folder: for the files of hibernated sessions; it goes with this.

    Attributes:
        handles: the sessions that are open, by name.
    """

    def __init__(self, residency: Residency, scheduler: Scheduler, pool: Pool, backlog: Backlog, folder: Path) -> None:
        self.residency, self.scheduler, self.pool, self.backlog = residency, scheduler, pool, backlog
        self.handles: dict[str, EngineSession] = {}
        self._files = (folder / f"{number}.safetensors" for number in count())
        self._naming = threading.Lock()
        self.end = weakref.finalize(self, _end, residency, scheduler, pool, folder)

    def resident(self, name: str, config: SessionConfig, weight: float, least: int) -> Resident:
        """A new session, that has no bytes yet.

        Raises:
            MillpondError: its name is none.
        """
        if not isinstance(name, str) or not name:
            raise MillpondError(f"a session's name is text, not {name!r}")
        with self._naming:
            return Resident(name, config, weight, least, next(self._files))

    def add(self, resident: Resident) -> EngineSession:
        """The handle of a session that has moved in."""
        with self._naming:
            handle = self.handles[resident.name] = EngineSession(self, resident)
            return handle

    def remove(self, handle: EngineSession) -> None:
        """Forget a session that was closed."""
        with self._naming:
            if self.handles.get(handle.name) is handle:
                del self.handles[handle.name]

    def list(self) -> tuple[EngineSession, ...]:
        """Those that are open, in the order of their names."""
        with self._naming:
            return tuple(self.handles[name] for name in sorted(self.handles))


def _end(residency: Residency, scheduler: Scheduler, pool: Pool, folder: Path) -> None:
    """Threads and files go, also where nothing was closed."""
    pool.close()
    residency.clear()
    scheduler.close()
    shutil.rmtree(folder, ignore_errors=True)


def _nothing() -> None:
    """Nobody is to be told."""
