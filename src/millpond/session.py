"""A session: one endless stream, one memory, questions at any moment.

The only place that sees all rooms: frames go through a family's vision tower into the pond, a policy keeps the pond under
its cap, and a question runs behind the memory and is rolled back, so that asking leaves the stream bit-identical.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from millpond import admission as admissions
from millpond import policies
from millpond.admission.base import Admission
from millpond.answer import Answer, LayerMemory, Usage
from millpond.budget import Budget
from millpond.decoding import decode
from millpond.device import DEFAULT_FRAME, load_within
from millpond.errors import BudgetError, MillpondError, PolicyError
from millpond.families.base import Family, Tokens
from millpond.flow import Flow, Positions, dated, places
from millpond.frames import Frame
from millpond.intake import Intake
from millpond.plan import Plan
from millpond.policies.base import Policy
from millpond.second_look import Shot

__all__ = ["Session"]

DEFAULT_POLICY = "infinipot-v"
DEFAULT_POSITIONS: Positions = "contiguous"


class Session:
    """Watch frames, answer questions, never hold a byte more than the budget.

    Args:
        family: an adapted model (`millpond.families.load` or `adapt`), shared freely between sessions.
        budget: bytes for everything the stream remembers: `"64MiB"`, `"2GB"` or an int. None only with the policy "full".
        policy: a name (`millpond policies` lists them) or a `Policy`.
        positions: what happens to rotary positions near the trained limit. "contiguous" closes the gaps that evictions left, so
            that distances stay in the trained range; "absolute" keeps true distances in time and shifts all numbers. Measured
            in docs/accuracy.md.
        system: a system message, pinned with the prompt.
        reserve_tokens: slots kept free for a question and its answer; by default an eighth of all, 32 to 512.
        admission: what of each frame is let in at all, before the policy: a name ("curvestream") or an `Admission`. None lets
            every frame in whole. Frames still waiting for their group are shown to a question whole, whatever it is.
        recent_frames: that many of the latest frames, in whole groups, are kept as pixels, encoded again for each question, and
            shown to it in full behind the memory. 0: none.
        host_budget: bytes of host memory for what leaves the device, beside `budget`: for a policy that recalls frames from there
            ("rekv"), which needs it. When it is full, the oldest frames are forgotten.
        host_path: a folder; host memory is then a mapped file in it, without a name, gone with the session.

    Raises:
        BudgetError: the budget cannot even hold the prompt and one turn; names the least that works.
        PolicyError: no such policy or admission, or the two do not go together; host memory that is missing or not used.
    """

    def __init__(
        self,
        family: Family,
        *,
        budget: str | int | None,
        policy: str | Policy = DEFAULT_POLICY,
        positions: Positions = DEFAULT_POSITIONS,
        system: str | None = None,
        reserve_tokens: int | None = None,
        admission: str | Admission | None = None,
        recent_frames: int = 0,
        host_budget: str | int | None = None,
        host_path: str | Path | None = None,
    ) -> None:
        if positions not in ("absolute", "contiguous"):
            raise MillpondError(f"positions must be 'absolute' or 'contiguous', not {positions!r}")
        chosen = policies.read(policy) if isinstance(policy, str) else policy
        if chosen.recalls and host_budget is None:
            raise PolicyError(f"the policy {chosen.name!r} recalls frames from host memory: give it a host_budget")
        if not chosen.recalls and (host_budget is not None or host_path is not None):
            raise PolicyError(
                f"the policy {chosen.name!r} moves nothing to host memory: leave out host_budget and host_path"
            )
        self._flow = Flow(
            family,
            budget=None if budget is None else int(Budget(budget)),
            policy=chosen,
            positions=positions,
            system=system,
            reserve_tokens=reserve_tokens,
            admission=admissions.read(admission) if isinstance(admission, str) else admission,
            recent_frames=recent_frames,
            host_budget=None if host_budget is None else int(Budget(host_budget)),
            host_path=host_path,
        )
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._intake = Intake(self._flow)

    @property
    def family(self) -> Family:
        """The adapted model."""
        return self._flow.family

    @property
    def policy(self) -> Policy:
        """What chooses which tokens survive."""
        return self._flow.policy

    @property
    def positions(self) -> Positions:
        """What happens to rotary positions near the trained limit."""
        return self._flow.positions

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | tuple[Any, Any],
        *,
        budget: str | int | None = None,
        device_memory: str | int | None = None,
        policy: str | Policy = DEFAULT_POLICY,
        positions: Positions = DEFAULT_POSITIONS,
        system: str | None = None,
        reserve_tokens: int | None = None,
        admission: str | Admission | None = None,
        recent_frames: int = 0,
        host_budget: str | int | None = None,
        host_path: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        max_pixels: int | None = None,
        target_bits: float | None = None,
        frame_size: tuple[int, int] = DEFAULT_FRAME,
    ) -> Session:
        """Load a model and start a session on it; the other arguments are those of `Session`.

        Args:
            model: a folder (also one that `millpond quantize` wrote), a hub id, or a loaded `(model, processor or tokenizer)`.
            device_memory: in place of a budget: bytes for weights, stream and workspace together, split by
                `millpond.device.plan_device`. A quantized model is read at the width that fits.
            dtype: for example "bfloat16"; the checkpoint's own by default.
            device: "cpu", "cuda", ...; CUDA where there is one by default.
            attn_implementation: "sdpa" (default), "eager" or "flash_attention_2".
            max_pixels: most pixels of a frame after resizing: smaller frames cost fewer tokens. Not for a loaded model.
            target_bits: mean bits of a decoding step, for a calibrated folder.
            frame_size: height and width in pixels of the largest frame that `device_memory` is planned for.

        Raises:
            ModelError: not found, or no supported family; BudgetError: too small.
        """
        if device_memory is not None and budget is not None:
            raise BudgetError("give a budget or device_memory, not both")
        stream = {
            "policy": policies.read(policy) if isinstance(policy, str) else policy,
            "positions": positions,
            "system": system,
            "reserve_tokens": reserve_tokens,
            "admission": admissions.read(admission) if isinstance(admission, str) else admission,
            "recent_frames": recent_frames,
        }
        family, granted = load_within(
            model,
            device_memory,
            frame_size,
            stream,
            target_bits=target_bits,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            max_pixels=max_pixels,
        )
        whole = budget if device_memory is None else granted
        return cls(family, budget=whole, host_budget=host_budget, host_path=host_path, **stream)  # type: ignore[arg-type]

    # --- watching -----------------------------------------------------------------------------------------------

    def feed(self, source: Frame | Iterable[Any]) -> int:
        """Take in one frame, a list of frames, or everything a source gives; return the number of frames taken.

        Frames are `millpond.frames.Frame`, or pairs of (seconds, uint8 [H, W, 3] RGB). Their times must ascend. A source whose
        times begin again (a second clip) goes on where the stream stands, one frame interval later.

        Raises:
            SourceError: the source broke, or a frame is not one. What had been seen before stays remembered.
            BudgetError: frames of this size cannot fit the budget; names the least that works. Nothing is lost.
        """
        with self._exclusive(), self._flow.timed("total"):
            return self._intake.feed(source)

    # --- asking -------------------------------------------------------------------------------------------------

    def ask(self, question: str, *, max_new_tokens: int = 128, remember: bool = False) -> Answer:
        """Answer a question about the stream so far; greedy decoding.

        The stream's memory is bit-identical afterwards, unless `remember` keeps the turn in it (under the same cap).

        Raises:
            BudgetError: the question does not fit into the turn's reserve; names a budget that would do.
        """
        pieces = self.stream(question, max_new_tokens=max_new_tokens, remember=remember)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                answer: Answer = done.value
                return answer

    def stream(
        self, question: str, *, max_new_tokens: int = 128, remember: bool = False
    ) -> Generator[str, None, Answer]:
        """Answer like `ask`, in pieces of text as they come; the generator's return value is the `Answer`.

        Until the generator is finished or closed, the session belongs to it: other threads wait.
        """
        if max_new_tokens < 1:
            raise MillpondError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if not question.strip():
            raise MillpondError("the question is empty")
        with self._exclusive():
            began = perf_counter()
            mark, clock = self._flow.pond.length, replace(self._flow.clock)
            try:
                with torch.no_grad():
                    answer = yield from self._generate(question, max_new_tokens, remember, began)
                if not remember:
                    self._flow.roll_back(mark, clock)
            except BaseException:
                self._flow.roll_back(mark, clock)
                raise
            finally:
                self._flow.seconds["answers"] += perf_counter() - began
                self._flow.seconds["total"] += perf_counter() - began
            return replace(answer, usage=self.usage)

    def _generate(self, question: str, limit: int, remember: bool, began: float) -> Generator[str, None, Answer]:
        asked_us = self._intake.last_us or 0
        start = self._flow.pond.length
        reopening, again, waiting = self._intake.shown()
        after_video = bool(again or waiting) or self._intake.video_open
        asked = dated(self.family.question(question, after_video=after_video), asked_us)
        if remember:
            self._flow.ask_proxy()  # while its reserve is free, and before it could see the question
        recalled, kept = self._flow.recallable, [*reopening, *waiting, asked]
        self._flow.pond.admit_turn(recalled + _most_tokens(again, self.plan) + sum(len(part) for part in kept) + 1)
        for part in reopening:
            self._flow.run(part)
        before = self._flow.pond.length
        for block in again:
            self._flow.run(self._intake.encode(block))
        seen_again = self._flow.pond.length - before
        for part in waiting:
            self._flow.run(part)
        behind = self._flow.pond.length
        hidden = self._flow.ask(asked)
        done = yield from decode(self._flow, hidden, asked_us, limit=limit, run_last=remember)
        if remember:
            self._flow.pond.cut(behind, recalled)
            self._flow.pond.cut(before, seen_again)
            self._remember(kept + done.kept, start)
        return Answer(
            question=question,
            text=done.text,
            token_ids=tuple(done.token_ids),
            finish_reason=done.finish_reason,
            at_seconds=asked_us / 1e6,
            first_token_seconds=(done.first or perf_counter()) - began,
            usage=self.usage,
        )

    def _remember(self, turn: list[Tokens], start: int) -> None:
        """Make a turn that has run part of the stream."""
        self._intake.close_video()
        for part in turn:
            self._flow.pond.commit(part.time_us, places(part, text=not bool(part.visual.any())))
        self._flow.tokens += self._flow.pond.length - start
        with self._flow.timed("compaction"):
            self._flow.pond.admit(0)  # the turn used the reserve: give it back

    # --- the budget ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """How the budget is split now: for the largest frames so far, or for text alone before the first."""
        return self._flow.plan

    def plan_for(self, height: int, width: int) -> Plan:
        """How the budget would be split for frames of `height` x `width` pixels.

        Raises:
            BudgetError: too small for such frames; names the least that works.
        """
        return self._flow.plan_for(self.family.grid(height, width))

    def resize(self, budget: str | int) -> None:
        """Change the budget while the stream runs; a smaller one compacts at once.

        Raises:
            BudgetError: too small for this model and frame size; names the least that works. Nothing changes.
        """
        with self._exclusive():
            self._flow.resize(budget)

    # --- looking in ---------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Bytes, tokens, frames and seconds so far."""
        pond = self._flow.pond
        seconds: dict[str, Any] = {f"seconds_{stage}": spent for stage, spent in self._flow.seconds.items()}
        return Usage(
            budget_bytes=pond.plan.budget,
            live_bytes=pond.live_bytes,
            allocated_bytes=pond.ledger.held,
            peak_bytes=pond.ledger.peak,
            full_cache_bytes=self._flow.tokens * self.family.geometry.kv_bytes_per_token,
            frames_seen=self._intake.frames,
            frames_dropped=self._intake.dropped,
            frames_skipped=self._intake.skipped,
            frames_reduced=self._intake.reduced,
            timestamps_kept=pond.timestamps(),
            memory_tokens=pond.memory_tokens,
            stream_tokens=self._flow.tokens,
            evicted_tokens=pond.evicted,
            compactions=pond.compactions,
            reanchorings=self._flow.reanchorings,
            stream_seconds=(self._intake.last_us or 0) / 1e6,
            **seconds,
            **({} if pond.host is None else pond.host.usage()),
        )

    def memory(self) -> tuple[LayerMemory, ...]:
        """What is remembered: time and place of every kept token, per layer and head."""
        with self._exclusive():
            return tuple(
                LayerMemory(
                    seconds=times.cpu().numpy() / 1e6,
                    row=place[:, :, 0].cpu().numpy().copy(),
                    column=place[:, :, 1].cpu().numpy().copy(),
                    packed=self._flow.pond.packed_tokens,
                )
                for times, place in self._flow.pond.kept()
            )

    def fork(self) -> Session:
        """A second session on a copy of the memory, with a budget of the same size of its own."""
        with self._exclusive():
            other = object.__new__(Session)
            other.__dict__.update(self.__dict__)
            other._flow = self._flow.fork()
            other._intake = self._intake.fork(other._flow)
            other._turn, other._owner = threading.Lock(), None
            return other

    # --- one thing at a time ------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            raise MillpondError("an answer is still being streamed: finish it or close() it first")
        with self._turn:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None


def _most_tokens(blocks: list[list[Shot]], plan: Plan) -> int:
    """Slots that frames take; at most, because a timestamp's text varies in length."""
    return sum(-(-len(block) // plan.frames_per_group) for block in blocks) * plan.group_tokens
