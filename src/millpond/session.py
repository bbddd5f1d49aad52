"""A session: one endless stream, one memory, questions at any moment.

Frames go through a family's vision tower into the pond, a policy keeps the pond under its cap, and a question runs behind the
memory and is rolled back, so that asking leaves the stream bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from time import perf_counter
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
from millpond.stream.exclusive import Once
from millpond.stream.ingest import Ingest
from millpond.stream.pending_answer import Answering, PendingAnswer
from millpond.stream.runner import Runner
from millpond.stream.turn import RememberedTurn, Turn


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
        compaction most of all, waits until it has ended, and a live source drops frames by its own rule then. Whatever is raised, an interrupt included, every block of frames is in
        the memory or is not; one that the model could not take counts as dropped.

        Raises:
            SourceError: the source broke, or a frame is not one, or its time is out of reach: more than a year after the one before it.
                What had been seen before stays remembered, and the stream goes on with the next frame.
            ModelError: the model was cast or moved after the session began.
            BudgetError: frames of this size cannot fit the budget; names the minimum that works. Nothing is lost.
            MillpondError: this thread is feeding already.
        """
        self._runner.check_model()
        with self._feeding.held(), self._runner.timed("total"):
            return self._ingest.feed(source, self._taking)

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
                answer: Answer = done.value
                return answer

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
        answer = self.begin(question, max_new_tokens=max_new_tokens, remember=remember)
        try:
            yield from answer
            return answer.result()
        finally:
            answer.cancel()
            # A generator may be collected anywhere, also in a thread that is at the memory.
            if not self._runner.access.mine:
                answer.wait()

    def answering(self, question: str, *, max_new_tokens: int = 128, remember: bool = False) -> Answering:
        """What generates the answer to a question, for who drives it himself; it is known then that it can be asked.

        Raises:
            MillpondError: as for `ask`, where it can be seen from the arguments.
        """
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise MillpondError(f"max_new_tokens must be at least 1, not {max_new_tokens!r}")
        if not isinstance(question, str):
            raise MillpondError(f"a question is text, not {question!r}")
        if not question.strip():
            raise MillpondError("the question is empty")
        if remember:
            check(self.policy, TURNS)
        return partial(self._answer, question, int(max_new_tokens), remember)

    def _answer(
        self,
        question: str,
        limit: int,
        remember: bool,
        waiting: Callable[[], None],
        begins: Callable[[], None],
    ) -> Generator[str, None, Answer]:
        began, runner = perf_counter(), self._runner
        turn: Turn | None = None
        # What is remembered has its place in the stream, so the stream waits for it.
        with runner.access.stream.held(waiting) if remember else nullcontext(), runner.access.turn.held(waiting):
            try:
                while True:
                    # Not around the yield: what the caller does in between is not ours to hold up or to run without gradients.
                    with self._changing():
                        if turn is None:
                            begins()
                            runner.finish_turns()
                            runner.check_model()
                            at = self._ingest.at  # once: while they wait frames may come at any time
                            self._ingest.make_room(at)
                            turn = (RememberedTurn if remember else Turn)(runner, self._ingest, at, question, limit)
                            del at
                        piece = turn.next_piece()
                        if piece is None:
                            turn.commit()
                            break
                    yield piece
            except BaseException:
                if turn is not None:
                    with self._changing():
                        turn.roll_back()
                raise
            finally:
                runner.spend("answers", perf_counter() - began)
                runner.spend("total", perf_counter() - began)
            done = turn.done
            return Answer(
                question=question,
                text=done.text,
                token_ids=tuple(done.token_ids),
                finish_reason=done.finish_reason,
                at_seconds=turn.time_us / 1e6,
                first_token_seconds=(done.first or perf_counter()) - began,
                usage=self.usage,
            )

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
        with self._exclusive():
            self._runner.resize(budget, self._ingest.make_fit)

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Bytes, tokens, frames and seconds so far; from any thread, also within one's own streaming loop."""
        with self._changing():  # before the first frame this makes the memory
            return Usage(**self._runner.usage(), **self._ingest.usage())

    @property
    def held_bytes(self) -> int:
        """Bytes held at this instant, by the ledger, and in host memory; waits for nobody, and makes nothing."""
        return self._runner.held_bytes

    def memory(self) -> tuple[LayerMemory, ...]:
        """What is remembered: time and grid position of every kept token, per layer and head; of a turn only if it is remembered."""
        with self._changing():
            return self._runner.memory()

    def fork(self) -> Session:
        """A second session on a copy of the memory, with a budget of the same size of its own."""
        with self._exclusive():
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
        with self._exclusive():
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

    # --- one thing at a time ------------------------------------------------------------------------------------

    @contextmanager
    def _taking(self) -> Iterator[None]:
        """Nobody else changes the stream."""
        with _writable(), self._runner.access.stream.held():
            self._runner.finish_roll_back()
            yield

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The same, and nobody's turn runs, and nobody reads meanwhile."""
        with _writable(), self._runner.access.stream.held(), self._runner.alone():
            yield

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody reads or changes the memory meanwhile."""
        with _writable(), self._runner.access.instant.held():
            yield


def _nothing() -> None:
    """There is nobody to tell."""


@contextmanager
def _writable() -> Iterator[None]:
    """Whatever is allocated can be written to later, wherever the caller is."""
    with torch.inference_mode(False), torch.no_grad():
        yield
