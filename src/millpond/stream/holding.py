"""The memory for a block of frames: at once beside a turn that runs, or, where it has to move first, when that turn has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millpond.cache.rerotation import leaves_range
from millpond.stream.runner import Runner


@contextmanager
def held_block(runner: Runner, tokens: int, clock: int | None = None) -> Iterator[None]:
    """Hold the memory for a block, prepared by `Runner.prepare_block`, within a `with` block."""
    with runner.access.instant.held():
        if not _waits(runner, tokens, tokens if clock is None else clock):
            if runner.pond.turn is None:
                runner.prepare_block(tokens, clock)
            runner.pond.bring_stream()
            yield
            return
    with runner.alone():
        runner.prepare_block(tokens, clock)
        yield


def make_room(runner: Runner, tokens: int) -> None:
    """Ensure capacity for a block that is still to come."""
    with runner.access.instant.held():
        if runner.pond.turn is None or runner.pond.overrun(tokens) <= 0:
            with runner.timed("compaction"):
                runner.ensure_capacity(tokens)
            return
    with runner.alone(), runner.timed("compaction"):
        runner.ensure_capacity(tokens)


def _waits(runner: Runner, tokens: int, clock: int) -> bool:
    """Whether a block has to wait for a running turn: it would take the turn's slots, or the memory has to move for it."""
    pond = runner.pond
    if pond.turn is None:
        return False
    due = pond.overrun(tokens) > 0 or leaves_range(runner.family.rope, runner.clock, runner.ahead(clock))
    return due or not pond.fits_beside_turn(tokens)
