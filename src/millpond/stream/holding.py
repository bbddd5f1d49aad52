"""The memory for a block of frames: at once beside a turn that runs, or, where it has to move first, when that turn has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millpond.cache.rerotation import leaves_range
from millpond.stream.runner import Runner


@contextmanager
def held_block(runner: Runner, most: int) -> Iterator[None]:
    """Hold the memory within a `with` block, for a block of frames of at most so many tokens that is prepared and run in it."""
    with runner.access.instant.held():
        if not _waits(runner, most):
            yield
            return
    with runner.alone():
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


def _waits(runner: Runner, tokens: int) -> bool:
    """Whether a block has to wait for a running turn: it would take the turn's slots, or the memory has to move for it."""
    pond = runner.pond
    if pond.turn is None:
        return False
    due = pond.overrun(tokens) > 0 or leaves_range(runner.family.rope, runner.clock, runner.ahead(tokens))
    return due or not pond.fits_beside_turn(tokens)
