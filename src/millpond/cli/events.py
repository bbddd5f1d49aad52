"""What happens during a watch, as lines of JSON that another program can follow. Knows nothing about sessions."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from millpond.cli.errors import note
from millpond.errors import MillpondError
from millpond.printable import printable


class EventLog:
    """Adds to a file, one object a line, each written through at once; any thread may write.

    Once it cannot be written (a full disk), that is said and nothing more is noted: no reason to end what is watched.

    Args:
        path: the file; None notes nothing.
        quiet: do not say so.

    Raises:
        MillpondError: the file cannot be opened.
    """

    def __init__(self, path: Path | None, *, quiet: bool = False) -> None:
        self._lock = threading.Lock()
        self._path, self._quiet = path, quiet
        if fault := self._line(""):
            raise MillpondError(fault)

    def write(self, event: str, **fields: Any) -> None:
        """Note an event under the wall time, UTC."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._lock:
            if fault := self._line(json.dumps({"time": time, "event": event, **fields}) + "\n"):
                self._path = None
                if not self._quiet:
                    note(f"{fault}; no more of them are noted")

    def _line(self, text: str) -> str:
        """Write; the fault in words, or nothing."""
        if self._path is None:
            return ""
        try:
            # Opened anew each time, so that the file may be moved away and begun again meanwhile.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            return f"cannot write events to {printable(str(self._path))}: {error.strerror or type(error).__name__}"
        return ""
