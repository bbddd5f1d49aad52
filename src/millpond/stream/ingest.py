"""Frames on their way in: given a time, queued at model resolution, and run through the model by whole blocks.

Owns what waits for its block, the stream's times, and which frames a question is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from millpond import frames
from millpond.cache.plan import Plan
from millpond.errors import SourceError
from millpond.frames import Frame
from millpond.models.base import Grid, Tokens
from millpond.stream.holding import held_block, make_room
from millpond.stream.recent_frames import Groups, Shot, blocks_of, with_block
from millpond.stream.runner import Runner, dated
from millpond.stream.step import Step

# Beyond these a stream's microseconds leave 64 bits, or its positions (up to 25 a second) 32; the clock could never go back.
_FARTHEST_SECONDS = 10**11
_LONGEST_GAP_SECONDS = 366 * 24 * 3600


@dataclass(frozen=True)
class Standing:
    """How far the frames of a stream have come. Replaced as a whole, so that a frame is in or is not.

    Attributes:
        waiting: those whose block is not full. grid: of these; None without any.
        recent: those that have run and are kept as pixels.
        video_open: the last token in memory leaves a video open: where the next frame goes.
        last_us: time of the latest frame; None before the first. interval_us: since the one before it.
        frames, dropped, skipped, reduced: raw frames taken in, lost, left out and thinned, as in `millpond.Usage`.
    """

    waiting: tuple[Shot, ...] = ()
    recent: Groups = ()
    grid: Grid | None = None
    video_open: bool = True  # the opening ends where the first frame goes
    last_us: int | None = None
    interval_us: int = 0
    frames: int = 0
    dropped: int = 0
    skipped: int = 0
    reduced: int = 0

    def without(self, count: int) -> Standing:
        """The same when the first `count` waiting frames have gone."""
        left = self.waiting[count:]
        return replace(self, waiting=left, grid=self.grid if left else None)


class Ingest:
    """The frames of one stream, until they have run.

    Attributes:
        at: how far they have come.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.at = Standing()

    def feed(self, source: Frame | Iterable[Any], taking: Callable[[], AbstractContextManager[None]]) -> int:
        """Take in everything that a source gives; see `millpond.Session.feed`. The stream is held, by `taking`, a frame at a time."""
        if isinstance(source, Frame):
            if self.at.last_us is not None and round(source.seconds * 1e6) <= self.at.last_us:
                raise SourceError(
                    f"a frame at {source.seconds:.3f} s comes after one at {self.at.last_us / 1e6:.3f} s: times must ascend"
                )
            source = [source]
        opened = source if hasattr(source, "dropped") else frames.open(source)
        taken, dropped, offset = 0, getattr(opened, "dropped", 0), None
        arriving = iter(opened)
        try:
            while True:
                with self._runner.timed("source"):
                    frame = next(arriving, None)
                if frame is None:
                    break
                with taking():
                    offset = self._offset(frame, offset)
                    before = self.at.frames
                    try:
                        self._take(round(frame.seconds * 1e6) + offset, frame.pixels)
                    finally:
                        taken += self.at.frames - before
        finally:
            # Also after a fault: what came before it stays answerable.
            if isinstance(opened, frames.Source) and opened is not source:
                opened.close()
            with taking():
                self.update_ledger()
                self.at = replace(self.at, dropped=self.at.dropped + getattr(opened, "dropped", 0) - dropped)
                self._digest(partial=False)
                self.make_room(self.at)
        return taken

    def _offset(self, frame: Any, offset: int | None) -> int:
        """Microseconds between a frame's own time and the stream's; None before the first frame of a source.

        Raises:
            SourceError: not a frame, or at a time that the stream cannot reach.
        """
        if not isinstance(frame, Frame):
            raise SourceError(f"a source must give frames, not {type(frame).__name__}")
        last = self.at.last_us
        if not math.isfinite(frame.seconds) or abs(frame.seconds) > _FARTHEST_SECONDS:
            far = f"within {_FARTHEST_SECONDS:.0e} s of 0, not at {frame.seconds:g} s"
            raise SourceError(f"a frame's time must lie {far}")
        time_us = round(frame.seconds * 1e6)
        if offset is None:
            # A source whose times begin again goes on one frame interval behind the last.
            offset = 0 if last is None or time_us > last else last + max(self.at.interval_us, 1) - time_us
        if last is not None and time_us + offset - last > _LONGEST_GAP_SECONDS * 1_000_000:
            raise SourceError(
                f"a frame at {frame.seconds:g} s comes {(time_us + offset - last) / 1e6:.3g} s after the one before it, which is more "
                f"than a year: it is left out"
            )
        return offset

    def make_fit(self, plan: Plan) -> None:
        """Run the complete groups that wait, if another plan has smaller blocks, in which so many frames do not fit."""
        if _nbytes(self.at.waiting) > plan.waiting_bytes:
            self._digest(partial=False)

    def _take(self, time_us: int, pixels: np.ndarray) -> None:
        """Queue one frame at model resolution; run the block when it is full."""
        runner, last = self._runner, self.at.last_us
        time_us = time_us if last is None else max(time_us, last + 1)  # distinct: a time identifies its group
        grid = runner.family.grid(*pixels.shape[:2])
        if self.at.grid is not None and grid != self.at.grid:
            self._digest(partial=True)  # a group holds frames of one size
        runner.fit(grid)
        with runner.timed("vision"):
            prepared = runner.family.prepare(pixels)
        at = replace(
            self.at,
            waiting=(*self.at.waiting, (time_us, prepared)),
            grid=grid,
            last_us=time_us,
            interval_us=0 if last is None else time_us - last,
            frames=self.at.frames + 1,
        )
        runner.pond.ledger.hold("waiting frames", _nbytes(at.waiting))
        self.at = at
        if len(at.waiting) >= runner.pond.plan.block_groups * runner.family.frames_per_group:
            self._digest(partial=False)

    def _digest(self, *, partial: bool) -> None:
        """Run the waiting frames through the model: all complete groups, and with `partial` the incomplete one too."""
        size = self._runner.family.frames_per_group
        count = len(self.at.waiting) if partial else len(self.at.waiting) // size * size
        if not count:
            return
        with torch.no_grad():
            try:
                if not self.at.video_open:
                    self._reopen(self.at.waiting[0][0])
                self._run(self.at.waiting[:count])
            except BaseException:
                if len(self.at.waiting) >= count:
                    # A block that the model could not take is dropped, not tried for ever.
                    self.at = replace(self.at.without(count), dropped=self.at.dropped + count)
                    self.update_ledger()
                raise

    def _reopen(self, time_us: int) -> None:
        """Open a video again behind a turn."""
        runner = self._runner
        tokens = dated(runner.family.embed(runner.family.reopening()), time_us)
        with held_block(runner, len(tokens)):
            runner.prepare_block(len(tokens))
            step = Step(runner, self)
            try:
                runner.put(tokens, text=True)
                # A video's time begins with its first frame: none of those before could stand in it.
                self.at = replace(self.at, video_open=True, recent=())
                step.commit()
            except BaseException:
                step.roll_back()
                raise

    def _run(self, block: tuple[Shot, ...]) -> None:
        """Take a block of waiting frames into the memory."""
        runner, size = self._runner, self._runner.family.frames_per_group
        assert self.at.grid is not None
        with held_block(runner, -(-len(block) // size) * self.at.grid.tokens):
            tokens = self.encode(block)
            admitted, verdicts, seen = runner.judge(tokens)
            runner.prepare_block(len(tokens) if admitted is None else len(admitted), len(tokens))
            step = Step(runner, self, accumulated_attention=runner.policy.needs.accumulated_attention)
            try:
                runner.put(tokens, text=False, admitted=admitted)
                runner.admission_state = seen
                at = replace(self.at.without(len(block)), recent=self._recent_with(block))
                for index, verdict in enumerate(verdicts):
                    skipped, reduced = (
                        min(size, len(block) - index * size) * (verdict == of) for of in ("drop", "reduced")
                    )
                    at = replace(at, skipped=at.skipped + skipped, reduced=at.reduced + reduced)
                self.at = at
                step.commit()
            except BaseException:
                step.roll_back()
                raise

    def _recent_with(self, block: Sequence[Shot]) -> Groups:
        """The recent frames when a block has run."""
        size = self._runner.family.frames_per_group
        return with_block(self.at.recent, block, size, -(-self._runner.recent_frames // size))

    def encode(self, shots: Sequence[Shot]) -> Tokens:
        """Frames as the decoder takes them; all of one size."""
        with self._runner.timed("vision"):
            return self._runner.family.encode([frame for _, frame in shots], [time for time, _ in shots])

    def make_room(self, at: Standing) -> None:
        """Ensure capacity for the frames that wait, so that a question can show them: an incomplete group when its feed has ended, and so
        before anybody asks; in the middle of a feed, when somebody does."""
        if at.grid is not None:
            reopening = 0 if at.video_open else len(self._runner.family.reopening())
            groups = -(-len(at.waiting) // self._runner.family.frames_per_group)
            make_room(self._runner, reopening + groups * at.grid.tokens)

    def shown(self, at: Standing) -> tuple[list[int], list[Sequence[Shot]]]:
        """What a question sees of the latest frames, asked when they stand so; nothing is taken in.

        Returns:
            The ids that reopen the video, where that is needed; and blocks of frames to `encode`: the recent ones, and last the waiting
            ones, which may be none.
        """
        runner, size, waiting = self._runner, self._runner.family.frames_per_group, at.waiting
        count = -(-max(0, runner.recent_frames - len(waiting)) // size)
        recent = blocks_of(at.recent, count, size, runner.pond.plan.block_groups)
        blocks: list[Sequence[Shot]] = [*recent, waiting]
        reopening = runner.family.reopening() if any(blocks) and not at.video_open else []
        return reopening, blocks

    def close_video(self) -> None:
        """A turn that is remembered ends the video, with the frames that it was shown."""
        left = self.at.without(len(self.at.waiting))
        self.at = replace(left, recent=self._recent_with(self.at.waiting), video_open=False)

    def update_ledger(self) -> None:
        """Enter in the ledger what the waiting frames and the recent ones take."""
        # The frames of a block go from one account to the other, so the one that shrinks comes first.
        recent = sum(map(_nbytes, self.at.recent))
        ledger, sizes = self._runner.pond.ledger, {"waiting frames": _nbytes(self.at.waiting), "recent pixels": recent}
        for name in sorted(sizes, key=lambda name: sizes[name] - ledger.account(name)):
            ledger.hold(name, sizes[name])

    def state(self) -> Standing:
        """Everything that frames on their way in go on with."""
        return self.at

    def restore(self, state: Standing) -> None:
        """Go on where a `state` stood; can be repeated. What that takes is for `update_ledger` to enter."""
        self.at = state

    def fork(self, runner: Runner) -> Ingest:
        """The same for a copy of the runner."""
        other = Ingest(runner)
        other.restore(self.state())
        other.update_ledger()
        return other

    def usage(self) -> dict[str, Any]:
        """What `millpond.Usage` shows of it, by its names there."""
        at = self.at
        return {
            "frames_seen": at.frames,
            "frames_dropped": at.dropped,
            "frames_skipped": at.skipped,
            "frames_reduced": at.reduced,
            "stream_seconds": (at.last_us or 0) / 1e6,
        }


def _nbytes(shots: Iterable[Shot]) -> int:
    return sum(frame.nbytes for _, frame in shots)
