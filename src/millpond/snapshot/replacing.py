"""One file in place of another: written beside it, brought to disk, renamed. Knows nothing about what is in it.

Whoever reads the path sees the old file or the new one, never half of one, also when the writer is killed at any instant. A writer holds a
lock on its temporary file, which ends with its process, so that what a killed one left can be told from what is being written.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from millpond.errors import SnapshotError
from millpond.printable import printable

if sys.platform != "win32":
    import fcntl

_PRIVATE = 0o600  # a snapshot holds pictures


class Writer:
    """A new file, written from its beginning.

    Args:
        descriptor: of the file, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview) -> None:
        """Append all of it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def overwrite(self, at: int, data: bytes) -> None:
        """Write a few bytes anew, `at` bytes from the beginning."""
        os.lseek(self._descriptor, at, os.SEEK_SET)
        self.write(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Writer]:
    """Within it a new file is written, which takes the place of `path` at the end of the block; whatever is raised, nothing has changed.

    A link stays, and what it leads to is replaced. A new file is for its owner alone, an old one's mode is kept. What earlier writers of
    this path left when they were killed is taken away.

    Raises:
        SnapshotError: it cannot be written; says why.
    """
    with _told(path):
        target, mode = _target(path)
        _sweep(target)
        descriptor, beside = _begin(target)
        try:
            if mode != _PRIVATE and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            yield Writer(descriptor)
            _sync(descriptor)
            os.replace(beside, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
        finally:
            os.close(descriptor)
        _sync_folder(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file could be put there now; leaves everything as it is.

    Raises:
        SnapshotError: it could not.
    """
    with _told(path):
        target, _ = _target(path)
        descriptor, beside = _begin(target)
        try:
            os.unlink(beside)
        finally:
            os.close(descriptor)


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses, as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SnapshotError(f"cannot save to {printable(str(path))}: {reason}") from error


def _target(path: str | os.PathLike[str]) -> tuple[Path, int]:
    """The file to be replaced, links followed, and its mode."""
    try:
        target = Path(os.path.realpath(path))
    except TypeError:
        raise ValueError(f"a path is expected, not {path!r}") from None
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target, _PRIVATE
    if stat.S_ISDIR(mode):
        raise ValueError("it is a folder: name a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError("it is no plain file")
    return target, stat.S_IMODE(mode)


def _begin(target: Path) -> tuple[int, Path]:
    """A new locked file beside the target: descriptor and path."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        beside = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}"
        descriptor = os.open(beside, flags, _PRIVATE)
        # Until the lock is there, another writer takes it for one that was left.
        if _lock(descriptor, wait=True) is False or os.fstat(descriptor).st_nlink:
            return descriptor, beside
        os.close(descriptor)


def _prefix(target: Path) -> str:
    """How temporary files of a target begin; short, so that a long name can be saved to."""
    return f".millpond-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file; whether it is locked now. Some file systems, and Windows, have no locks: then nothing is ever taken for left."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(target: Path) -> None:
    """Take away the temporary files of this target that no living writer holds."""
    if sys.platform == "win32":
        return
    prefix = _prefix(target)
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if name.startswith(prefix):
                _sweep_one(target.parent / name)


def _sweep_one(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor, wait=False):
                os.unlink(path)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to disk."""
    if sys.platform == "win32":
        return  # which has no way to
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Bring a file or folder to disk; on macOS, where that takes another call, out of the drive's own cache too."""
    os.fsync(descriptor)
    if sys.platform == "darwin":
        with suppress(OSError):  # not every file system can
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
