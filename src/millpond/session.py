"""A session: one endless stream, one memory, questions at any moment.

Frames go through a family's vision tower into the pond, a policy keeps the pond under its cap, and a question runs behind the
memory and is rolled back, so that asking leaves the stream bit-identical.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from millpond.answer import Answer, LayerMemory, Usage
from millpond.cache.plan import Plan
from millpond.config import Positions, SessionArguments, SessionConfig, configured
from millpond.device import DEFAULT_FRAME, default_budget, load_within
from millpond.errors import BudgetError, MillpondError, ModelError
from millpond.frames import Frame
from millpond.memory.available import check_memory
from millpond.memory.budget import Budget
from millpond.models.base import Family
from millpond.policies.base import Policy
from millpond.policies.composition import NO_HOST_MEMORY, TURNS, check
from millpond.snapshot import load, save
from millpond.standing import OnAnswer, StandingQuestion
from millpond.standing.asking import Begun, Stream, ask_together
from millpond.standing.questions import Asked, StandingQuestions, Wanted
from millpond.standing.schedule import Schedule
from millpond.stream.answering import answer
from millpond.stream.exclusive import Once
from millpond.stream.holding import changing, exclusive, taking
from millpond.stream.ingest import Ingest
from millpond.stream.pending_answer import Answering, PendingAnswer
from millpond.stream.question import check_question
from millpond.stream.runner import Runner


class Session:
    """Watch frames, answer questions, never hold a byte more than the budget.

    Args:
        family: an adapted model (`millpond.models.load` or `adapt`), shared freely between sessions.
        config: a `millpond.SessionConfig`, which says what a session's arguments are.
        arguments: its fields by name, in its place or over it: `Session(family, budget="64MiB", policy="keydiff")`.

    Raises:
        BudgetError: the budget cannot even hold the prompt and one turn; names the minimum that works. Or it is more than the memory that
            there is.
        PolicyError: as for a `SessionConfig`; or the policy needs host memory.
        ModelError: `family` is none.
        MillpondError: as for a `SessionConfig`.
    """

    def __init__(
        self, family: Family, config: SessionConfig | None = None, **arguments: Unpack[SessionArguments]
    ) -> None:
        if not isinstance(family, Family):
            raise ModelError(f"a Session runs an adapted model, not {family!r}: Session.from_pretrained loads one")
        config = configured(config, **arguments)
        check(config.policy, *([NO_HOST_MEMORY] if config.host_budget is None else []))
        self._runner = Runner(family, config)
        if config.budget is not None:
            check_memory(self._runner.plan.total_bytes, family.device)
        if config.host_budget is not None and config.host_path is None:
            check_memory(config.host_budget)
        self._begin(self._runner, Ingest(self._runner))

    def _begin(self, runner: Runner, ingest: Ingest) -> None:
        """All that a session is: a stream, what waits in front of it, and who feeds it."""
        self._runner, self._ingest = runner, ingest
        self._standing = StandingQuestions()
        self._feeding = Once("frames are being fed: give this feed's source the frames, or wait until it has ended")

    @property
    def family(self) -> Family:
        """The adapted model."""
        return self._runner.family

    @property
    def policy(self) -> Policy:
        """What chooses which tokens survive."""
        return self._runner.policy

    @property
    def positions(self) -> Positions:
        """What happens to rotary positions near the trained limit."""
        return self._runner.positions

    @property
    def config(self) -> SessionConfig:
        """The session's arguments, with the budget that is in force."""
        return self._runner.config

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | tuple[Any, Any],
        config: SessionConfig | None = None,
        *,
        device_memory: str | int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        max_pixels: int | None = None,
        target_bits: float | None = None,
        frame_size: tuple[int, int] = DEFAULT_FRAME,
        **arguments: Unpack[SessionArguments],
    ) -> Session:
        """Load a model and start a session on it.

        Args:
            model: a folder (also one that `millpond quantize` wrote), a hub id, or a loaded `(model, processor or tokenizer)`.
            config, arguments: as for a `Session`. The budget is by default `millpond.device.default_budget`: a minute of video in full
                detail, at most half of the free memory.
            device_memory: in place of a budget: bytes for weights, stream and workspace together, split by
                `millpond.device.plan_device`. A quantized model is read at the bit-width that fits. Sets glibc's malloc for the whole
                process (`millpond.memory.heap.hold_nothing`).
            dtype: for example "bfloat16"; the checkpoint's own by default.
            device: "cpu", "cuda", ...; CUDA where there is one by default.
            attn_implementation: "sdpa" (default), "eager" or "flash_attention_2".
            max_pixels: most pixels of a frame after resizing: smaller frames cost fewer tokens. Not for a loaded model.
            target_bits: mean bits of a decoding step, for a calibrated folder.
            frame_size: height and width in pixels of the largest frame that `device_memory` or the default budget is planned for.

        Raises:
            ModelError: not found, or no supported family; BudgetError: too small, or more than the memory that there is.
        """
        config = configured(config, **arguments)
        if device_memory is not None and config.budget is not None:
            raise BudgetError("give a budget or device_memory, not both")
        if not (
            isinstance(frame_size, tuple | list)
            and [isinstance(side, int) and side > 0 for side in frame_size] == [True] * 2
        ):
            raise MillpondError(f"frame_size must be a height and a width in pixels, not {frame_size!r}")
        family, granted = load_within(
            model,
            device_memory,
            frame_size,
            config,
            target_bits=target_bits,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            max_pixels=max_pixels,
        )
        budget = config.budget if device_memory is None else granted
        if budget is None and config.policy.capped:
            budget = default_budget(family, config, frame_size)
        return cls(family, replace(config, budget=budget))

    # --- watching -----------------------------------------------------------------------------------------------

    def feed(self, source: Frame | Iterable[Any]) -> int:
        """Take in one frame, a list of frames, or everything a source gives; return the number of frames taken.

        Frames are `millpond.frames.Frame`, or pairs of (seconds, uint8 [H, W, 3] RGB). Their times must ascend. A source whose
        times begin again (a second clip) goes on where the stream stands, one frame interval later.

        Other threads may ask meanwhile, and frames go on while an answer is generated: only what touches the memory as a whole, a
        compaction most of all, waits until it has ended, and a live source drops frames by its own rule then. Whatever is raised, an
        interrupt included, every block of frames is in the memory or is not; one that the model could not take counts as dropped.

        Raises:
            SourceError: the source broke, or a frame is not one, or its time is out of reach: more than a year after the one before it.
                What had been seen before stays remembered, and the stream goes on with the next frame.
            ModelError: the model was cast or moved after the session began.
            BudgetError: frames of this size cannot fit the budget; names the minimum that works. Nothing is lost.
            MillpondError: this thread is feeding already.
        """
        self._runner.check_model()
        with self._feeding.held(), self._runner.timed("total"):
            try:
                live = getattr(getattr(source, "info", None), "live", False)
                return self._ingest.feed(source, partial(taking, self._runner), partial(self._ask_standing, live))
            finally:
                self._standing.settle()

    # --- asking -------------------------------------------------------------------------------------------------

    def ask(self, question: str, *, max_new_tokens: int = 128, remember: bool = False) -> Answer:
        """Answer a question about the stream so far; greedy decoding.

        It sees what is in memory when it is asked, and other threads may feed meanwhile. The stream's memory is bit-identical afterwards,
        unless `remember` keeps the turn in it (under the same cap), for which frames wait. Questions that are asked at once are answered
        in turn, each about the memory of the moment at which its turn begins.

        Raises:
            BudgetError: the question does not fit into the turn's reserve; names a budget that would do.
            ModelError: the model was cast or moved after the session began.
            MillpondError: the question is empty or no text, or spells control tokens that the model's tokenizer cannot take as mere text;
                or `max_new_tokens` is no number from 1 on.
        """
        pieces = self.answering(question, max_new_tokens=max_new_tokens, remember=remember)(_nothing, _nothing)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                whole: Answer = done.value
                return whole

    def begin(self, question: str, *, max_new_tokens: int = 128, remember: bool = False) -> PendingAnswer:
        """Begin to answer like `ask`, in a thread of its own, and return at once: with the question asked of the memory of this instant,
        or waiting for those that were asked before.

        Frames may be fed meanwhile, also by this thread.

        Raises:
            MillpondError: as for `ask`, where it can be seen from the arguments; everything else is raised by what it returns.
        """
        return PendingAnswer(self.answering(question, max_new_tokens=max_new_tokens, remember=remember))

    def stream(
        self, question: str, *, max_new_tokens: int = 128, remember: bool = False
    ) -> Generator[str, None, Answer]:
        """Answer like `ask`, in pieces of text as they come; the generator's return value is the `Answer`.

        The question is asked when the first piece is. How fast they are read holds nobody up. What ends the generator early, an error,
        an interrupt or `close`, leaves the stream as it was before the question.
        """
        pending = self.begin(question, max_new_tokens=max_new_tokens, remember=remember)
        try:
            yield from pending
            return pending.result()
        finally:
            pending.cancel()
            # A generator may be collected anywhere, also in a thread that is at the memory.
            if not self._runner.access.mine:
                pending.wait()

    def answering(self, question: str, *, max_new_tokens: int = 128, remember: bool = False) -> Answering:
        """What generates the answer to a question, for who drives it himself; it is known then that it can be asked.

        Raises:
            MillpondError: as for `ask`, where it can be seen from the arguments.
        """
        check_question(question, max_new_tokens)
        if remember:
            check(self.policy, TURNS)
        asked = question, int(max_new_tokens), remember
        return partial(answer, self._runner, self._ingest, lambda: self.usage, *asked)

    # --- asking again and again ---------------------------------------------------------------------------------

    def every(
        self, seconds: float, question: str, *, max_new_tokens: int = 128, on_answer: OnAnswer | None = None
    ) -> StandingQuestion:
        """Ask a question again and again while frames are fed: each time that `seconds` of stream time have gone by.

        Due times are multiples of `seconds` after the stream's first frame (or the one at which the session's first standing question
        was set up). The question is asked when the first frame at or after a due time is in, in the thread that feeds, about what the
        stream is then; where frames jump over several due times, once. The stream's memory stays as it is: nothing is remembered.
        Questions due at the same instant share the run of the frames that they are shown.

        From any thread, also during a feed. A `fork` has none of them.

        Args:
            on_answer: called with each `millpond.standing.StandingEvent` in the thread that feeds, which waits for it; it may ask, and
                cancel, but not feed. What it raises is counted and warned of once.

        Raises:
            MillpondError: as for `ask`; or `seconds` is no number above 0. What goes wrong later, at a due time, is an event.
        """
        check_question(question, max_new_tokens)
        self.family.question(question, after_video=True)  # refuses control tokens
        standing = StandingQuestion(question, Schedule(seconds), int(max_new_tokens), on_answer)
        with self._runner.access.instant.held():
            self._standing.add(standing, self._ingest.at.last_us)
        return standing

    @property
    def standing(self) -> StandingQuestions:
        """Its standing questions, all together: for who loads a session in place of one that it saved, and sets them there."""
        return self._standing

    @standing.setter
    def standing(self, questions: StandingQuestions) -> None:
        self._standing = questions

    def _ask_standing(self, live: bool) -> None:
        """What the frame that was taken in has made due. Frames of a live source do not wait for the answer."""

        def ask(wanted: Sequence[Wanted]) -> Asked:
            if live and len(wanted) == 1:
                ((question, limit),) = wanted
                return Begun([self.begin(question, max_new_tokens=limit)])
            return ask_together(Stream(self._runner, self._ingest, lambda: self.usage), wanted)

        last_us = self._ingest.at.last_us
        if self._standing and last_us is not None:
            self._standing.frame_taken(last_us, ask)

    # --- the budget ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """How the budget is split now: for the largest frames so far, or for text alone before the first."""
        with self._runner.access.instant.held():
            return self._runner.plan

    def plan_for(self, height: int, width: int) -> Plan:
        """How the budget would be split for frames of `height` x `width` pixels.

        Raises:
            BudgetError: too small for such frames; names the minimum that works.
        """
        with self._runner.access.instant.held():
            return self._runner.plan_for(self.family.grid(height, width))

    def resize(self, budget: str | int) -> None:
        """Change the budget while the stream runs; a smaller one compacts at once.

        Raises:
            BudgetError: too small for this model and frame size; names the minimum that works. Nothing changes.
        """
        with exclusive(self._runner):
            self._runner.resize(budget, self._ingest.make_fit)

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Bytes, tokens, frames and seconds so far; from any thread, also within one's own streaming loop."""
        with changing(self._runner):  # before the first frame this makes the memory
            return Usage(**self._runner.usage(), **self._ingest.usage())

    @property
    def held_bytes(self) -> int:
        """Bytes held at this instant, by the ledger, and in host memory; waits for nobody, and makes nothing."""
        return self._runner.held_bytes

    def memory(self) -> tuple[LayerMemory, ...]:
        """What is remembered: time and grid position of every kept token, per layer and head; of a turn only if it is remembered."""
        with changing(self._runner):
            return self._runner.memory()

    def fork(self) -> Session:
        """A second session on a copy of the memory, with a budget of the same size of its own."""
        with exclusive(self._runner):
            runner = self._runner.fork()
            other = object.__new__(Session)
            other._begin(runner, self._ingest.fork(runner))
            return other

    # --- to a file and back ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything that the session goes on with to one file, in place of what was there; see docs/snapshots.md.

        Waits until a running turn has ended. When it returns the file is on disk; whoever reads meanwhile, or after this process was killed
        in the middle, finds the old file or the new one, whole.

        Raises:
            SnapshotError: it cannot be written, or a policy's or admission's values cannot; what was there stays.
        """
        with exclusive(self._runner):
            save(self._runner, self._ingest, path)

    @classmethod
    def load(
        cls, path: str | Path, model: Family | str | Path | tuple[Any, Any], **arguments: Unpack[SessionArguments]
    ) -> Session:
        """Go on where a saved session stood: the same frames and questions after it give the same bytes and answers.

        Args:
            model: the one that it was saved with: adapted, or as for `from_pretrained`, then loaded as its checkpoint says.
            arguments: those that are given must be the saved session's. Only these may differ: `budget`, to which the session is resized
                after it was loaded, and `host_path`, which is not saved. A policy or an admission that no package registers must be given.

        Raises:
            SnapshotError: no whole snapshot, of a newer format, or of another model, dtype, policy or other arguments; says what differs.
            BudgetError: more than the memory that there is, or the new budget is too small.
        """
        family = model if isinstance(model, Family) else load_within(model, None, DEFAULT_FRAME, SessionConfig())[0]
        budget = arguments.pop("budget", None)
        session = object.__new__(cls)
        session._begin(*load(path, family, host_path=arguments.pop("host_path", None), expected=arguments))
        if budget is not None and int(Budget(budget)) != session.config.budget:
            session.resize(budget)
        return session


def _nothing() -> None:
    """There is nobody to tell."""
