"""Frames on their way in: given a time, queued at model resolution, and run through the model by whole blocks.

Owns what waits for its block, and the stream's times. Knows nothing about questions but which frames one is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from millpond import frames
from millpond.errors import SourceError
from millpond.families.base import Grid, Tokens
from millpond.flow import Flow, dated
from millpond.frames import Frame
from millpond.second_look import SecondLook, Shot

__all__ = ["Intake"]


class Intake:
    """The frames of one stream, until they are in its flow.

    Attributes:
        waiting: (time_us, prepared frame) of those whose block is not full.
        video_open: the last token in memory leaves a video open: where the next frame goes.
        last_us: time of the latest frame; None before the first.
        frames, dropped, skipped, reduced: raw frames taken in, lost, left out and thinned, as in `millpond.Usage`.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.waiting: list[Shot] = []
        self._look = SecondLook(flow)
        self._grid: Grid | None = None  # of the waiting frames
        self.video_open = True  # the opening ends where the first frame goes
        self.last_us: int | None = None
        self._interval_us = 0
        self.frames = self.dropped = self.skipped = self.reduced = 0

    def feed(self, source: Frame | Iterable[Any]) -> int:
        """Take in everything that a source gives; see `millpond.Session.feed`."""
        if isinstance(source, Frame):
            if self.last_us is not None and round(source.seconds * 1e6) <= self.last_us:
                raise SourceError(
                    f"a frame at {source.seconds:.3f} s comes after one at {self.last_us / 1e6:.3f} s: times must ascend"
                )
            source = [source]
        opened = source if hasattr(source, "dropped") else frames.open(source)
        before = self.frames
        dropped, offset = getattr(opened, "dropped", 0), None
        arriving = iter(opened)
        try:
            while True:
                with self._flow.timed("source"):
                    frame = next(arriving, None)
                if frame is None:
                    break
                time_us = round(frame.seconds * 1e6)
                if offset is None:
                    again = self.last_us is not None and time_us <= self.last_us
                    offset = self.last_us + max(self._interval_us, 1) - time_us if again else 0  # type: ignore[operator]
                self._take(time_us + offset, frame.pixels)
        finally:
            # Also after a fault: what came before it stays answerable.
            self.dropped += getattr(opened, "dropped", 0) - dropped
            if isinstance(opened, frames.Source) and opened is not source:
                opened.close()
            self._digest(partial=False)
            self._make_room()
        return self.frames - before

    def _take(self, time_us: int, pixels: np.ndarray) -> None:
        """Queue one frame at model resolution; run the block when it is full."""
        if self.last_us is not None:
            time_us = max(time_us, self.last_us + 1)  # distinct: a time identifies its group
            self._interval_us = time_us - self.last_us
        grid = self._flow.family.grid(*pixels.shape[:2])
        if self._grid is not None and grid != self._grid:
            self._digest(partial=True)  # a group holds frames of one size
        self._flow.fit(grid)
        with self._flow.timed("vision"):
            prepared = self._flow.family.prepare(pixels)
        waiting = self._flow.pond.ledger.account("waiting")
        self._flow.pond.ledger.hold("waiting", waiting + prepared.nbytes)
        self.waiting.append((time_us, prepared))
        self._grid = grid
        self.last_us = time_us
        self.frames += 1
        if len(self.waiting) >= self._flow.pond.plan.block_groups * self._flow.family.frames_per_group:
            self._digest(partial=False)

    def _digest(self, *, partial: bool) -> None:
        """Run the waiting frames through the model: all complete groups, and with `partial` the incomplete one too."""
        size = self._flow.family.frames_per_group
        count = len(self.waiting) if partial else len(self.waiting) // size * size
        if not count:
            return
        block = self.waiting[:count]
        done = False
        try:
            with torch.no_grad():
                if not self.video_open:
                    self._flow.append(self._reopening(block[0][0]), text=True)
                    self.video_open = True
                    self._look.clear()  # a video's time begins with its first frame: none of those before could stand in it
                verdicts = self._flow.watch(self.encode(block))
            done = True
            for index, verdict in enumerate(verdicts or ()):
                frames_of_it = min(size, count - index * size)
                self.skipped += frames_of_it * (verdict == "drop")
                self.reduced += frames_of_it * (verdict == "reduced")
        finally:
            # A block that the model could not take is dropped, not tried for ever; the memory was rolled back.
            self.dropped += 0 if done else count
            del self.waiting[:count]
            self._flow.pond.ledger.hold("waiting", sum(frame.nbytes for _, frame in self.waiting))
            if not self.waiting:
                self._grid = None
            if done:
                self._look.keep(block)

    def encode(self, shots: list[Shot]) -> Tokens:
        """Frames as the decoder takes them; all of one size."""
        with self._flow.timed("vision"):
            return self._flow.family.encode([frame for _, frame in shots], [time for time, _ in shots])

    def _reopening(self, time_us: int) -> Tokens:
        """What stands between a turn and the frames that go on behind it."""
        return dated(self._flow.family.embed(self._flow.family.reopening()), time_us)

    def _make_room(self) -> None:
        """Make room for an incomplete group now, so that a question can show it without touching the memory."""
        if self.waiting and self._grid is not None:
            reopening = 0 if self.video_open else len(self._flow.family.reopening())
            with self._flow.timed("compaction"):
                self._flow.make_room(reopening + self._grid.tokens)

    def shown(self) -> tuple[list[Tokens], list[list[Shot]], list[Tokens]]:
        """What a question sees of the latest frames; nothing is taken in.

        Returns:
            What reopens the video, where that is needed; blocks of frames to `encode` once more; and the waiting frames.
        """
        again = self._look.blocks(len(self.waiting))
        waiting = [self.encode(self.waiting)] if self.waiting else []
        first = next(iter([*again, self.waiting]))
        reopening = [self._reopening(first[0][0])] if first and not self.video_open else []
        return reopening, again, waiting

    def close_video(self) -> None:
        """A turn that is remembered ends the video, with the frames that it was shown."""
        shown = list(self.waiting)
        self.waiting.clear()
        self._grid = None
        self._flow.pond.ledger.hold("waiting", 0)
        self._look.keep(shown)
        self.video_open = False

    def fork(self, flow: Flow) -> Intake:
        """The same for a copy of the flow."""
        other = object.__new__(Intake)
        other.__dict__.update(self.__dict__)
        other._flow, other.waiting = flow, list(self.waiting)
        flow.pond.ledger.hold("waiting", sum(frame.nbytes for _, frame in self.waiting))
        other._look = self._look.fork(flow)
        return other
