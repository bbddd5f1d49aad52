"""One session of an engine: in memory, or in its file. Who may move it is `millpond.engine.residency`'s business."""

from __future__ import annotations

import threading
from pathlib import Path

from millpond.answer import Usage
from millpond.config import SessionConfig
from millpond.errors import SnapshotError
from millpond.frames import Source
from millpond.models.base import Family
from millpond.session import Session
from millpond.standing.questions import StandingQuestions


class Resident:
    """One session of an engine, in memory or in its file.

    Args:
        name, weight: of the session. config: as asked for, with the budget that it takes at most; None: as much as it gets.
        least: bytes that its budget is never shrunk below. path: of its file.

    Attributes:
        session: None while it is hibernated. users: a mark for each use of it. moving: it is on its way to its file.
        last_used: when, as a running number. usage: as it was hibernated.
        hibernations: how often.
    """

    def __init__(self, name: str, config: SessionConfig, weight: float, least: int, path: Path) -> None:
        self.name, self.config, self.weight, self.least, self.path = name, config, weight, least, path
        self.session: Session | None = None
        self.users: set[object] = set()
        self.moving = self.closed = False
        self.last_used = self.hibernations = 0
        self.usage: Usage | None = None
        self.asleep_bytes = 0  # that it had, and needs to wake up
        self._standing: StandingQuestions | None = None  # of a hibernated one: no file holds them
        self.sources: set[Source] = set()  # that threads are feeding it
        self.sizing = threading.Lock()  # while its budget changes
        own_file = config.host_path is not None
        self.beside = 0 if own_file or config.host_budget is None else config.host_budget

    @property
    def most(self) -> int | None:
        """Bytes that it takes at most, host memory included."""
        return None if self.config.budget is None else self.config.budget + self.beside

    def save(self) -> Usage:
        """Write it to its file; returns its usage.

        Raises:
            SnapshotError: it cannot be written.
        """
        assert self.session is not None
        try:
            self.session.save(self.path)
        except OSError as error:
            raise SnapshotError(f"the session {self.name!r} cannot be hibernated: {error}") from error
        self._standing = self.session.standing
        return self.session.usage

    def load(self, family: Family) -> Session:
        """The session in its file, with the budget that it had.

        Raises:
            SnapshotError: it cannot be read.
        """
        config = self.config
        session = Session.load(
            self.path, family, policy=config.policy, admission=config.admission, host_path=config.host_path
        )
        if self._standing is not None:
            session.standing = self._standing
        return session
