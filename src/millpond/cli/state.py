"""A watch that goes on where it was: its session in a file, saved every so often, and the source from there on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from millpond.frames import Frame, Losses
from millpond.snapshot import check_writable

if TYPE_CHECKING:
    from millpond.session import Session

# A stream's times are in microseconds.
_TOLERANCE_SECONDS = 0.5e-6


class StateFile:
    """The file of one watch.

    Args:
        path: of the snapshot. every: wall seconds between two of them, at least.

    Attributes:
        reached: stream time in seconds at which it goes on; None for a stream that begins.

    Raises:
        SnapshotError: nothing can be saved there.
    """

    def __init__(self, path: Path, every: float) -> None:
        check_writable(path)  # before an hour has been watched
        self._path, self._every = path, every
        self._saved: object = None
        self._due = monotonic() + every
        self.reached: float | None = None

    def resume(self, session: Session, *, keep_budget: bool) -> Session:
        """The session that was saved, if one was; otherwise the one given, which says how it must be.

        Args:
            keep_budget: the saved session's, in place of the given one's.

        Raises:
            SnapshotError: what is there is no snapshot, or one of another session; says what differs.
        """
        if not self._path.exists():
            return session
        config = session.config
        arguments: Any = {field.name: getattr(config, field.name) for field in fields(config)}
        if keep_budget:
            del arguments["budget"]
        resumed = type(session).load(self._path, session.family, **arguments)
        usage = resumed.usage
        self.reached = usage.stream_seconds if usage.frames_seen else None
        self._saved = _progress(resumed)
        return resumed

    def save(self, session: Session, *, now: bool = False) -> None:
        """Save, if it is time to, or `now`, and something has happened since.

        Raises:
            SnapshotError: it cannot be written; what was there stays.
        """
        if not now and monotonic() < self._due:
            return
        progress = _progress(session)
        if progress != self._saved:
            try:
                session.save(self._path)
                self._saved = progress
            finally:
                self._due = monotonic() + self._every


def _progress(session: Session) -> tuple[int, int, int]:
    usage = session.usage
    return usage.frames_seen, usage.frames_dropped, usage.stream_tokens


class Continued:
    """A source from where a stream stands: frames of a file up to there are left out, and what is live goes on from there.

    Args:
        source: an open `millpond.frames.Source`. after: stream time in seconds. step: to the first live frame.
    """

    def __init__(self, source: Any, after: float, step: float) -> None:
        self._source, self._after, self._step = source, after, step
        self.info = source.info

    def __iter__(self) -> Iterator[Frame]:
        shift: float | None = None
        for frame in self._source:
            if not self.info.live:
                if frame.seconds > self._after + _TOLERANCE_SECONDS:
                    yield frame
                continue
            if shift is None:
                shift = self._after + self._step - frame.seconds
            yield Frame(frame.seconds + shift, frame.pixels)

    @property
    def dropped(self) -> int:
        return int(self._source.dropped)

    @property
    def losses(self) -> Losses:
        losses: Losses = self._source.losses
        return losses

    def close(self) -> None:
        self._source.close()
