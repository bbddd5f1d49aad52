"""One step of a stream, a block of frames or a turn: wholly in, or as if it had not begun.

A step remembers what the stream was when it began, and puts it back when anything is raised before it is committed, a
KeyboardInterrupt or the end of a generator included. Memory is not copied for that: what a step appends lies behind what was there,
and is forgotten by its length. Only what a forward changes in place is copied: the queries of a proxy text and
accumulated attention. The latest frames' queries, where a policy looks at those, stay what each layer saw last.

Moves of the memory (compaction, re-anchoring, another size) stand outside of steps and are whole by themselves.
"""

from __future__ import annotations

from typing import Any, Protocol

from millpond.stream.runner import Runner
from millpond.stream.runner_state import RunnerMark


class Waiting(Protocol):
    """What stands in front of a runner and goes back with it: a `millpond.stream.ingest.Ingest`."""

    def state(self) -> Any:
        """What it goes on with; never changed afterwards."""

    def restore(self, state: Any) -> None:
        """Go back to a state; can be repeated."""

    def update_ledger(self) -> None:
        """Enter in the ledger what it holds now."""


class Step:
    """Begun when made; then `commit`, or `roll_back`. Until then it is the runner's `roll_back_open_step`: where rolling back is interrupted too, the
    session's next call goes on with it.

    Args:
        runner: the stream. ingest: what waits in front of it.
        queries, accumulated_attention: whether the step's forwards note queries, or accumulate attention; what there was is copied then.
    """

    def __init__(
        self, runner: Runner, ingest: Waiting, *, queries: bool = False, accumulated_attention: bool = False
    ) -> None:
        self._runner, self._ingest = runner, ingest
        self._mark: RunnerMark | None = None  # until the step is in, or has been taken back
        self._standing = ingest.state()
        runner.roll_back_open_step = self.roll_back
        try:
            self._mark = runner.mark(queries=queries, accumulated_attention=accumulated_attention)
        except BaseException:
            self._close()
            raise

    def commit(self) -> None:
        """The step is in: from here on nothing takes it back."""
        self._mark = None
        self._close()

    def roll_back(self) -> None:
        """Put everything back, unless the step is in already. Whatever interrupts this, it can be called again."""
        if self._mark is not None:
            self._runner.rewind(self._mark)
            self._ingest.restore(self._standing)
            self._mark = None
        self._close()

    def _close(self) -> None:
        self._runner.pond.release()
        self._ingest.update_ledger()
        self._runner.roll_back_open_step = None
