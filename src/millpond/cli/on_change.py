"""`--on-change COMMAND`: a program that is run for changed answers, with the event as JSON on its stdin.

In a thread of its own, one at a time, with a pause between two, and never for long: whatever the program does, nothing else waits for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from time import monotonic
from typing import Any

_PATIENCE_SECONDS = 60.0
_GRACE_SECONDS = 5.0  # for what runs when the stream was interrupted
_TERMINATE_SECONDS = 1.0
_SLICE_SECONDS = 0.05


@dataclass(frozen=True)
class Runs:
    """What became of the changes so far.

    Attributes:
        ran: times the program was run to its end, whatever that was. failed: of those, with another exit code than 0.
        stopped: times it was ended because it took too long. not_started: times it could not be run.
        replaced: changes that a newer one of the same question replaced while they waited. given_up: left when all ended.
    """

    ran: int = 0
    failed: int = 0
    stopped: int = 0
    not_started: int = 0
    replaced: int = 0
    given_up: int = 0


class ChangeCommand:
    """Runs a program for changes. At most one change of each question waits: the newest.

    Args:
        words: the program and its arguments.
        apart_seconds: least wall time between two starts.
        patience_seconds: after which one that has not ended is ended.
        quiet: its stderr is not shown; its stdout never is.

    Attributes:
        faults: what went wrong, in words, whenever it differs from the time before; for the one who speaks.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        apart_seconds: float = 1.0,
        patience_seconds: float = _PATIENCE_SECONDS,
        quiet: bool = False,
    ) -> None:
        self._words, self._apart, self._patience, self._quiet = list(words), apart_seconds, patience_seconds, quiet
        self.faults: SimpleQueue[str] = SimpleQueue()
        self._fault = ""
        self._runs = Runs()
        self._changed = threading.Condition()  # guards what waits, and the counts
        self._waiting: dict[Any, bytes] = {}
        self._closing = False
        self._launching = threading.Lock()  # after `_killed` nothing is launched
        self._killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="millpond-on-change", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> Runs:
        """What became of the changes so far."""
        return self._runs

    def total(self) -> str:
        """The same in one line; only what happened."""
        counted = {name: number for name, number in asdict(self._runs).items() if number and name != "ran"}
        rest = [f"{number} {name.replace('_', ' ')}" for name, number in counted.items()]
        return ", ".join([f"the command of --on-change was run {self._runs.ran} times", *rest])

    def put(self, key: object, event: Mapping[str, Any]) -> None:
        """A change of the question `key`; returns at once."""
        with self._changed:
            if key in self._waiting:
                self._count(replaced=1)
            self._waiting[key] = (json.dumps(event) + "\n").encode()
            self._changed.notify()

    def finish(self, hurry: Callable[[], bool]) -> None:
        """Run what waits, without a pause, and return when all has ended. Once `hurry`, only what runs may end, and soon."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        until = float("inf")
        while self._thread.is_alive() and monotonic() < until:
            if hurry() and until == float("inf"):
                until = monotonic() + _GRACE_SECONDS
                self._give_up()
            self._thread.join(_SLICE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End at once what runs, and run nothing more."""
        with self._launching:
            self._killed, process = True, self._process
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._give_up()
        if process is not None:
            _signal(process, signal.SIGTERM)
            self._thread.join(_TERMINATE_SECONDS)
            _signal(process, _KILL)  # also what it has started and left behind
        self._thread.join(_TERMINATE_SECONDS)

    # --- its thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        started = -float("inf")
        while True:
            with self._changed:
                while not (self._waiting or self._closing):
                    self._changed.wait()
                while self._waiting and not self._closing and (left := started + self._apart - monotonic()) > 0:
                    self._changed.wait(left)
                if not self._waiting:
                    if self._closing:
                        return
                    continue
                told = self._waiting.pop(next(iter(self._waiting)))
            started = monotonic()
            self._say(self._run(told))

    def _run(self, told: bytes) -> str:
        """Run the program once; what went wrong, in words, or nothing."""
        try:
            with self._launching:
                if self._killed:
                    self._count(given_up=1)
                    return ""
                process = self._process = subprocess.Popen(
                    self._words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if self._quiet else None,
                    start_new_session=True,  # a group of its own: it can be ended with all that it has started
                )
        except (OSError, ValueError) as error:
            self._count(not_started=1)
            return f"could not be run: {getattr(error, 'strerror', None) or error}"
        try:
            process.communicate(told, timeout=self._patience)
        except subprocess.TimeoutExpired:
            self._end(process)
            self._count(stopped=1)
            return f"was ended after {self._patience:g} s"
        finally:
            self._process = None
        self._count(ran=1, failed=int(process.returncode != 0))
        return "" if process.returncode == 0 else _ending(process.returncode)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_SECONDS)
        _signal(process, _KILL)
        process.wait()
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()

    def _say(self, fault: str) -> None:
        if fault and fault != self._fault:
            self.faults.put(f"the command of --on-change {fault}")
        self._fault = fault

    def _give_up(self) -> None:
        with self._changed:
            self._count(given_up=len(self._waiting))
            self._waiting.clear()

    def _count(self, **more: int) -> None:
        with self._changed:
            counted = asdict(self._runs)
            self._runs = replace(self._runs, **{name: counted[name] + number for name, number in more.items()})


_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send it to a program and all that it has started; nothing where they have ended."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _ending(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
