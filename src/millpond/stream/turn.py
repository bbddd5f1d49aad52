"""One turn: a question, the recent frames that it is shown, its answer; taken back afterwards, or kept as part of the stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from millpond.stream.generate import Generated, generate
from millpond.stream.ingest import Ingest
from millpond.stream.runner import Runner, dated
from millpond.stream.shown import Shown
from millpond.stream.step import Step


class Turn(Step):
    """A turn of one question, begun when made.

    `run` it to its end and `commit`; or `roll_back`. Between two pieces of the answer no tensor of the turn is held but its slots.

    Args:
        remember: `commit` keeps the turn in the stream; otherwise it leaves the stream as it was.

    Attributes:
        time_us: stream time at which it is asked. done: the answer, once it has been run.
    """

    _ingest: Ingest

    def __init__(self, runner: Runner, ingest: Ingest, *, remember: bool) -> None:
        self._remember = remember
        self.done = Generated()
        self._shown = Shown.now(runner, ingest)
        self._shown.make_room(runner)
        self.time_us = self._shown.time_us
        # A remembered turn may have the proxy asked anew.
        super().__init__(runner, ingest, queries=remember and runner.policy.needs.proxy == "prompt")

    def run(self, question: str, limit: int) -> Iterator[str]:
        """Ask, and decode an answer of at most `limit` tokens; yields its pieces.

        Raises:
            BudgetError: the question does not fit.
        """
        runner, ingest, pond = self._runner, self._ingest, self._runner.pond
        shown = self._shown
        if self._remember:
            runner.ask_proxy()  # while its reserve is free, and before it could see the question
        retrieved = runner.retrievable_tokens
        shown.ensure_capacity(runner, question)
        before, recent_tokens = shown.run(runner, ingest)
        behind = pond.length
        self.done = yield from generate(
            runner, self._ask(question, shown.after_video), self.time_us, limit=limit, run_last=self._remember
        )
        if self._remember:
            pond.cut(behind, retrieved)
            pond.cut(before, recent_tokens)

    def commit(self) -> None:
        """End the turn: kept, with the reserve freed for the next, or taken back."""
        if not self._remember:
            self.roll_back()
            return
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

    def _ask(self, question: str, after_video: bool) -> Tensor:
        return self._runner.ask(dated(self._runner.family.question(question, after_video=after_video), self.time_us))
