"""Reading a pipe so that it can be given up from another thread. Knows nothing about video."""

import os
import select
import stat
import sys

from millpond.errors import SourceError

_POLL_SECONDS = 0.1


class Pipe:
    """Stdin (`-`) or a named pipe, without seeking. A `Bytes`.

    Raises:
        SourceError: stdin is a terminal or closed, or the pipe cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self._cancelled = False
        self._mine = target != "-"
        fault = ""
        try:
            # A named pipe opened to block would wait for a writer, deaf to Ctrl-C.
            self._handle = (
                os.open(target, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)) if self._mine else sys.stdin.fileno()
            )
        except (OSError, ValueError, AttributeError) as error:
            fault = getattr(error, "strerror", None) or "it is closed"
        if fault:
            raise SourceError(f"cannot read {'stdin' if target == '-' else target}: {fault}")
        if os.isatty(self._handle):
            raise SourceError("stdin is a terminal: pipe a video into it, or name a file")
        self._begun = not (self._mine and stat.S_ISFIFO(os.fstat(self._handle).st_mode))

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, as soon as there are any; b"" at the end."""
        while not self._cancelled:
            if os.name == "posix" and not select.select([self._handle], [], [], _POLL_SECONDS)[0]:
                continue
            try:
                data = os.read(self._handle, size)
            except BlockingIOError:
                continue
            if data or self._begun:
                self._begun = True
                return data
            # End of a named pipe that nobody has opened for writing yet: wait for one who does.
            select.select([], [], [], _POLL_SECONDS)
        return b""

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self._cancelled = True
        if self._mine:
            self._mine = False
            os.close(self._handle)
