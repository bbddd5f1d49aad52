"""One turn: a question, the recent frames that it is shown, its answer; forgotten afterwards, or kept as part of the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from millpond.models.base import Tokens
from millpond.positions import Clock
from millpond.stream.generate import Generated, generate
from millpond.stream.ingest import Ingest, Standing
from millpond.stream.recent_frames import Shot
from millpond.stream.runner import Runner, dated
from millpond.stream.step import Step


class Turn:
    """A turn of one question that leaves no trace, begun when made.

    It has slots and a clock of its own behind the memory of the instant in which it is asked. While it waits for its next piece the stream
    may go on: neither sees the other. `next_piece` to the end and `commit`; or `roll_back`. Between two pieces no tensor is held but
    its slots.

    Args:
        runner: the stream, whose `turn` the caller holds. ingest: what waits in front of it.
        at: how far its frames have come: those that the question is shown, for which room has been made.
        question, limit: as in `Session.ask`.

    Attributes:
        time_us: stream time at which it is asked. done: the answer, once it has been run.
    """

    _remember: ClassVar[bool] = False

    def __init__(self, runner: Runner, ingest: Ingest, at: Standing, question: str, limit: int) -> None:
        self._runner, self._ingest = runner, ingest
        self.done = Generated()
        self.time_us = at.last_us or 0
        self._pieces = self._run(at, question, limit)

    def next_piece(self) -> str | None:
        """What the next token adds to the answer, perhaps nothing; None when it has ended. The caller holds the memory.

        The first call runs the question, with what it is shown.

        Raises:
            BudgetError: the question does not fit.
        """
        self._prepare()
        return next(self._pieces, None)

    def commit(self) -> None:
        """End the turn: its slots are the stream's again."""
        self.roll_back()

    def roll_back(self) -> None:
        """The same at any time. Whatever interrupts this, it can be called again; otherwise whoever comes next does."""
        self._runner.finish_turns()

    def _prepare(self) -> None:
        self._runner.finish_roll_back()  # of a block of frames, whose thread was interrupted in it
        self._runner.pond.bring_turn()

    def _clock(self) -> Clock | None:
        """That on which the turn runs; None for the stream's own."""
        return replace(self._runner.clock)

    def _begin(self) -> None:
        """Take slots, which are there."""
        self._runner.pond.begin_turn()

    def _run(self, at: Standing, question: str, limit: int) -> Iterator[str]:
        runner, ingest, pond = self._runner, self._ingest, self._runner.pond
        reopening, (*recent, waiting) = ingest.shown(at)
        after_video = any((*recent, waiting)) or at.video_open
        if self._remember:
            runner.ask_proxy()  # while its reserve is free, and before it could see the question
        retrieved = runner.retrievable_tokens
        most = len(reopening) + len(runner.family.question(question, after_video=after_video)) + 1
        pond.ensure_turn_capacity(retrieved + most + self._most_tokens([*recent, waiting]))
        clock = self._clock()
        self._begin()
        if reopening:
            # Recent frames may be older than the turn in front, and are cut out; what is kept follows that turn.
            time_us = waiting[0][0] if waiting else self.time_us
            runner.run(dated(runner.family.embed(reopening), time_us), clock)
        before = pond.length
        for block in recent:
            runner.run(ingest.encode(block), clock)
        recent_tokens = pond.length - before
        if waiting:
            runner.run(ingest.encode(waiting), clock)
        behind = pond.length
        del at, recent, waiting  # frames that the stream may let go of before the answer ends
        hidden = runner.ask(self._asked(question, after_video), clock)
        if not self._remember:
            pond.claim_turn(limit - 1)  # the last token is not run
        pieces = generate(
            runner, partial(runner.run, clock=clock), hidden, self.time_us, limit=limit, run_last=self._remember
        )
        del hidden
        self.done = yield from pieces
        if self._remember:
            pond.cut(behind, retrieved)
            pond.cut(before, recent_tokens)

    def _asked(self, question: str, after_video: bool) -> Tokens:
        return dated(self._runner.family.question(question, after_video=after_video), self.time_us)

    def _most_tokens(self, blocks: Sequence[Sequence[Shot]]) -> int:
        """Slots that frames take; at most, because a timestamp's text varies in length."""
        plan = self._runner.pond.plan
        return sum(-(-len(block) // plan.frames_per_group) for block in blocks) * plan.group_tokens


class RememberedTurn(Step, Turn):
    """A turn that `commit` keeps in the stream. It has its place there, so the stream waits until it has ended: the caller holds that too."""

    _remember = True
    _ingest: Ingest

    def __init__(self, runner: Runner, ingest: Ingest, at: Standing, question: str, limit: int) -> None:
        Turn.__init__(self, runner, ingest, at, question, limit)
        # It may have the proxy asked anew.
        Step.__init__(self, runner, ingest, queries=runner.policy.needs.proxy == "prompt")

    def commit(self) -> None:
        """End the turn: kept, with the reserve freed for the next."""
        runner, pond = self._runner, self._runner.pond
        assert self._mark is not None
        self._ingest.close_video()
        runner.keep_turn(self._mark)
        compactions = pond.compactions
        try:
            with runner.timed("compaction"):
                pond.ensure_capacity(0)  # the turn used the reserve: give it back
            super().commit()
        except BaseException:
            if pond.moving or pond.compactions != compactions:
                super().commit()  # the memory has moved on, or is about to, with the turn in it
            raise

    def _prepare(self) -> None:
        """Nothing to do: it is in front, and what is open is its own step."""

    def _clock(self) -> None:
        return None

    def _begin(self) -> None:
        """Nothing to do: it lies where the stream's own tokens would."""
