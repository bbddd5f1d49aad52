"""What a question is shown of the latest frames, behind the memory: the recent ones again, and those that wait for their block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millpond.positions import Clock
from millpond.stream.ingest import Ingest
from millpond.stream.recent_frames import Shot
from millpond.stream.runner import Runner
from millpond.stream.stored_tokens import dated


@dataclass(frozen=True)
class Shown:
    """What stands in front of a question that is asked now.

    Attributes:
        reopening: ids that open a video again, where that is needed.
        recent: blocks of frames that have run before. waiting: those whose block is not full.
        after_video: the question follows a video.
        time_us: stream time of the question.
        waiting_tokens: slots that the waiting frames take at most.
    """

    reopening: list[int]
    recent: list[Sequence[Shot]]
    waiting: Sequence[Shot]
    after_video: bool
    time_us: int
    waiting_tokens: int

    @classmethod
    def now(cls, runner: Runner, ingest: Ingest) -> Shown:
        """As the stream stands, when room has been made for the frames that wait; nothing may be running in it."""
        at = ingest.at  # once: frames may join those that wait at any time
        ingest.make_room(at)
        reopening, (*recent, waiting) = ingest.shown(at)
        after_video = any((*recent, waiting)) or at.video_open
        groups = -(-len(waiting) // runner.family.frames_per_group)
        waiting_tokens = 0 if at.grid is None else groups * at.grid.tokens
        return cls(reopening, recent, waiting, after_video, at.last_us or 0, waiting_tokens)

    def ensure_capacity(self, runner: Runner, question: str) -> None:
        """Make sure that all of it, the question, what that retrieves and one token fit.

        Raises:
            BudgetError: they do not.
        """
        plan = runner.pond.plan
        recent = sum(-(-len(block) // plan.frames_per_group) for block in self.recent) * plan.group_tokens
        shown = len(self.reopening) + recent + self.waiting_tokens
        asked = len(runner.family.question(question, after_video=self.after_video)) + 1
        runner.pond.ensure_turn_capacity(runner.retrievable_tokens + asked + shown)

    def run(self, runner: Runner, ingest: Ingest, clock: Clock | None = None) -> tuple[int, int]:
        """Run it behind the memory, on a clock of its own or the stream's; returns the slot where the recent frames begin, and how many tokens they are."""
        if self.reopening:
            # Recent frames may be older than the turn in front, and are cut out; what is kept follows that turn.
            time_us = self.waiting[0][0] if self.waiting else self.time_us
            runner.run(dated(runner.family.embed(self.reopening), time_us), clock)
        before = runner.pond.length
        for block in self.recent:
            runner.run(ingest.encode(block), clock)
        recent_tokens = runner.pond.length - before
        if self.waiting:
            runner.run(ingest.encode(self.waiting), clock)
        return before, recent_tokens
