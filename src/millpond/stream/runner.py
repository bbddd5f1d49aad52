"""The one way into the pond: tokens get positions and capacity, run through the decoder and stay.

Owns the memory of one stream, its clock and its budget. Takes tokens; frames and questions become tokens elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from millpond.admission.base import Verdict, admission_consumers
from millpond.admission.gate import filter_groups
from millpond.answer import LayerMemory
from millpond.cache.consumers import make_plan
from millpond.cache.host import HostCache
from millpond.cache.plan import Plan
from millpond.cache.pond import Mark, Pond, PondState
from millpond.cache.rerotation import stay_in_range
from millpond.cache.retrieval import Retrieval
from millpond.config import SessionConfig
from millpond.errors import BudgetError, ModelError
from millpond.memory.available import check_memory
from millpond.memory.budget import Budget
from millpond.models.base import Family, Grid, Tokens
from millpond.models.query_recorder import See
from millpond.policies.base import SEPARATOR
from millpond.policies.composition import SEPARATORS, check
from millpond.positions import Clock
from millpond.stream.consumers import FramesAsPixels
from millpond.stream.exclusive import Access


@dataclass(frozen=True, eq=False)
class RunnerState:
    """Everything that a stream goes on with, beside the settings with which it began and the frames that wait in front of it.

    Attributes:
        budget: bytes; None without a cap. grid: the largest frame size planned for.
        clock, tokens, reanchorings, seconds: as in `Runner`.
        admission: what the admission remembers of the stream.
        pond: the memory. Its tensors are views of the pond that gave it.
    """

    budget: int | None
    grid: Grid | None
    clock: Clock
    tokens: int
    reanchorings: int
    seconds: Mapping[str, float]
    admission: Any
    pond: PondState


@dataclass(frozen=True, eq=False)
class RunnerMark:
    """Where a step of a stream began. The attributes are those of `RunnerState`."""

    clock: Clock
    tokens: int
    admission: Any
    pond: Mark


class Runner:
    """One stream's memory and the way into it.

    Args:
        family: an adapted model.
        config: without a budget only for a policy that has no cap, without a host budget where nothing is retrieved, or only planned.

    Attributes:
        config: as given, with the budget that is in force. clock: where the next token stands.
        admission_state: what the admission remembers of the stream; replaced, never changed.
        grid: the largest frame size planned for; None before the first frame.
        tokens: stream tokens that went in, the prompt among them. reanchorings: how often positions were moved.
        seconds: spent by stage, see `millpond.Usage`.
        access: who may do what; whoever looks at the memory or changes it holds its `instant`.

    Raises:
        BudgetError: the budget cannot even hold the prompt and one turn; names the minimum that works.
    """

    def __init__(self, family: Family, config: SessionConfig) -> None:
        self.family = family
        self.config = config
        self.policy = config.policy
        self.recent_frames = config.recent_frames
        self.admission = config.admission
        self.admission_state: Any = None
        self.positions = config.positions
        self.clock = Clock()
        self.access = Access()
        self.grid: Grid | None = None
        self.tokens = self.reanchorings = 0
        self.seconds = dict.fromkeys(("source", "vision", "decoder", "compaction", "answers", "total"), 0.0)
        self._timing = threading.Lock()
        self.roll_back_open_step: Callable[[], None] | None = None
        self._opening = family.opening(config.system)
        self._proxy_tokens = len(family.question("", after_video=True)) if self.policy.needs.proxy == "prompt" else 0
        self.plan_for(None)  # refuse now what can never work
        self._pond: Pond | None = None  # allocated with the first frame or question, when the frames' size is known

    @property
    def pond(self) -> Pond:
        """The memory; made, with the prompt pinned in it, when it is first needed."""
        if self._pond is None:
            with (
                self.access.instant.held()
            ):  # which the caller need not hold, just to have a look at the plan or the ledger
                return self._pond or self._open()
        return self._pond

    def _open(self) -> Pond:
        plan = self.plan_for(self.grid)
        check_memory(plan.total_bytes, self.family.device)
        try:
            pond = self._pond = self._allocate(plan)
            with torch.no_grad():
                self.prepare_block(len(self._opening))
                self.put(self.family.embed(self._opening), text=True)
        except BaseException:
            self._pond, self.clock, self.tokens = None, Clock(), 0
            raise
        return pond

    def _allocate(self, plan: Plan) -> Pond:
        """An empty memory."""
        pond = Pond(self.family.geometry, plan, self.policy, self.family.device)
        pond.rope = self.family.rope
        pond.ledger.hold("admission", plan.state_bytes)
        if (budget := self.config.host_budget) is not None:
            pond.host = HostCache(self.family.geometry, self.family.rope, budget, self.config.host_path)
        return pond

    def check_model(self) -> None:
        """Make sure that the model is still as it was when the stream began.

        Raises:
            ModelError: it was cast, or moved to another device, since then.
        """
        weight, geometry = self.family.model.get_input_embeddings().weight, self.family.geometry
        if weight.dtype != geometry.dtype:
            changed = f"was {geometry.dtype} when it was adapted and is {weight.dtype} now"
            raise ModelError(f"the model {changed}: cast it before, and begin a new session")
        if self._pond is not None and self.family.device != self._pond.device:
            raise ModelError(
                f"the model has moved to {self.family.device} and the stream's memory is on {self._pond.device}: "
                "move it back, or begin a new session"
            )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds spent inside as that stage's."""
        began = perf_counter()
        try:
            yield
        finally:
            self.spend(stage, perf_counter() - began)

    def spend(self, stage: str, seconds: float) -> None:
        """Count seconds as that stage's; from any thread."""
        with self._timing:
            self.seconds[stage] += seconds

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the memory as a whole within a `with` block: a turn that runs ends first, and no other begins."""
        inner = self.access.turn.mine
        with self.access.turn.held(), self.access.instant.held():
            if not inner:
                self.finish_turns()
            yield

    def prepare_block(self, tokens: int, clock: int | None = None) -> None:
        """Compact and re-anchor, if need be, in front of a block of `tokens` tokens that takes `clock` positions, by default as many; and
        bring the stream to the front."""
        with self.timed("compaction"):
            self.ensure_capacity(tokens)
            self._stay_in_range(tokens if clock is None else clock)
            self.pond.bring_stream()

    def put(self, tokens: Tokens, *, text: bool, admitted: Tensor | None = None) -> None:
        """Run stream tokens, for which there is capacity, through the decoder and keep them; a `Step` takes back what a fault leaves.

        `admitted`, int64 [m], names those that are let in; every token takes its position on the clock all the same.
        """
        mark = self.pond.length
        with self.timed("decoder"):
            positions = self.family.assign_positions(tokens, self.clock)
            taken = tokens if admitted is None else tokens.pick(admitted)
            if len(taken):
                positions = positions if admitted is None else positions[:, admitted]
                # A remembered turn is never looked at: it holds a question.
                see = self._sight(positions) if not text or mark == 0 else None
                self._forward(taken, positions, text=text, see=see)
        if mark >= self.pond.plan.prompt_tokens and len(taken):
            self.pond.commit(taken.time_us, grid_positions(taken, text=text))
        self.tokens += len(tokens)

    def judge(self, frames: Tokens) -> tuple[Tensor | None, tuple[Verdict, ...], Any]:
        """What the admission lets in of a block of frames: the tokens (None: all), its verdict on each group, and its next state."""
        if self.admission is None:
            return None, (), None
        return filter_groups(self.admission, frames, self.admission_state)

    def run(self, tokens: Tokens, clock: Clock | None = None) -> Tensor:
        """One forward of the decoder over a turn behind the live tokens, on a clock of its own or the stream's; returns hidden states
        [n, hidden]."""
        positions = self.family.assign_positions(tokens, clock or self.clock)
        return self._forward(tokens, positions, text=not bool(tokens.visual.any()))

    @property
    def retrievable_tokens(self) -> int:
        """Tokens that a question would retrieve from host memory now."""
        return 0 if self.pond.host is None else min(self.pond.plan.retrieved_tokens, self.pond.host.tokens)

    def ask(self, question: Tokens, clock: Clock | None = None) -> Tensor:
        """Run a question behind the live tokens and what it retrieves, on a clock of its own or the stream's; returns hidden states
        [n, hidden]."""
        if not self.retrievable_tokens:
            return self.run(question, clock)
        clock = clock or self.clock
        retrieval = Retrieval(self.pond, self.family.rope, clock, closed=self.positions == "contiguous")
        positions = self.family.assign_positions(question, clock)
        return self._forward(question, positions, text=True, see=retrieval.fill, before=True)

    def _forward(
        self, tokens: Tokens, positions: Tensor, *, text: bool, see: See | None = None, before: bool = False
    ) -> Tensor:
        self.pond.write_metadata(tokens.time_us, grid_positions(tokens, text=text), positions)
        with self.family.showing_queries(see, before=before) if see else nullcontext():
            return self.family.forward(tokens, positions, self.pond)

    def _sight(self, positions: Tensor, *, proxy_text: bool = False) -> See | None:
        """What the policy needs of the queries of a block at `positions`, [axes, n]; None when it needs nothing.

        A proxy text is no part of the stream: its attention is not summed up.
        """
        pond, rope, noted = self.pond, self.family.rope, self.policy.needs.proxy is not None
        summed = self.policy.needs.accumulated_attention and not proxy_text

        def see(layer: int, queries: Tensor) -> None:
            if noted:
                pond.queries.note(layer, queries, positions, rope)
            if summed:
                pond.accumulate_attention(layer, queries, positions)

        return see if noted or summed else None

    def ensure_capacity(self, tokens: int) -> None:
        """Compact, if `tokens` stream tokens would not fit beside the turn's reserve."""
        if self.pond.overrun(tokens) > 0:
            self.ask_proxy()
        self.pond.ensure_capacity(tokens)

    def ask_proxy(self) -> None:
        """Run the chat template's tokens behind the live ones, in the turn's reserve, for their queries; then take them back."""
        if not self._proxy_tokens or self.pond.memory_tokens == 0:
            return
        mark, clock = self.pond.length, replace(self.clock)
        proxy = self.family.question("", after_video=True)
        try:
            positions = self.family.assign_positions(proxy, self.clock)
            self._forward(proxy, positions, text=True, see=self._sight(positions, proxy_text=True))
            self.roll_back(mark, replace(clock))
        except BaseException:
            # Also when it was the taking back that was interrupted: what stays would be taken for the stream's.
            self.roll_back(mark, clock)
            raise

    def _stay_in_range(self, tokens: int) -> None:
        """Re-anchor when the next block or turn would pass the positions that the weights were trained on."""
        pond, closing = self.pond, self.positions == "contiguous"
        self.reanchorings += stay_in_range(pond, self.family.rope, self.clock, self.ahead(tokens), closing=closing) > 0

    def ahead(self, tokens: int) -> int:
        """Positions that a block and the turn behind it may take."""
        return tokens + self.pond.plan.turn_tokens + self.pond.plan.recent_tokens

    def roll_back(self, mark: int, clock: Clock) -> None:
        """Forget everything from slot `mark` on and put the clock back."""
        self.pond.truncate(mark)
        self.clock = clock

    def finish_roll_back(self) -> None:
        """Put back a step whose taking back was interrupted; for whoever holds the stream or the turn, so that none is being made."""
        if self.roll_back_open_step is not None:
            with self.access.instant.held():
                self.roll_back_open_step()

    def finish_turns(self) -> None:
        """The same, and end a turn whose end was interrupted; for whoever has come by its slots."""
        self.finish_roll_back()
        if self._pond is not None:
            self._pond.end_turn()

    @property
    def plan(self) -> Plan:
        """How the budget is split now: for the largest frames so far, or for text alone before the first."""
        return self.plan_for(None) if self._pond is None else self._pond.plan

    def plan_for(self, grid: Grid | None, budget: int | None = None) -> Plan:
        """How the budget, or another one, would be split for frames of that size; None: for text alone."""
        if grid is not None and grid.tokens != grid.rows * grid.cols:
            check(self.policy, SEPARATORS)
        if grid is not None and self.config.host_budget is not None:
            HostCache.check(self.family.geometry, self.config.host_budget, grid.tokens)
        what = "this model's prompt and one turn" if grid is None else f"frames of {grid.width} x {grid.height}"
        frame_bytes = 0 if grid is None else grid.height * grid.width * 3
        pixels = FramesAsPixels(frame_bytes, self.recent_frames, len(self.family.reopening()))
        return make_plan(
            self.config.budget if budget is None else budget,
            self.family.geometry,
            self.policy,
            prompt_tokens=len(self._opening),
            group_tokens=1 if grid is None else grid.tokens,
            frames_per_group=self.family.frames_per_group,
            reserve_tokens=self.config.reserve_tokens,
            proxy_tokens=self._proxy_tokens,
            reserve=[pixels.slots],
            beside=[pixels.waiting, pixels.pixels, *admission_consumers(self.admission, self.family.hidden)],
            what=what,
        )

    def fit(self, grid: Grid) -> None:
        """Split the budget anew when frames turn out larger than planned for."""
        known = self.grid
        if known is not None and grid.tokens <= known.tokens and grid.height * grid.width <= known.height * known.width:
            return
        plan = self.plan_for(grid)
        with self.alone():
            if self._pond is not None and not self.policy.capped:
                plan = plan.with_slots(max(plan.slots, self._pond.plan.slots))
            self._move(plan, self.config, grid)

    def resize(self, budget: str | int, make_fit: Callable[[Plan], None]) -> None:
        """Change the budget; a smaller one compacts at once. See `millpond.Session.resize`.

        `make_fit` is called when it is known that the new plan works, while the old one is in force: what is held beside the memory must
        fit the new one too.
        """
        if not self.policy.capped:
            raise BudgetError(f"the policy {self.policy.name!r} has no budget to resize")
        size = int(Budget(budget))
        plan = self.plan_for(self.grid, size)
        held = 0 if self._pond is None else self._pond.ledger.held
        check_memory(plan.total_bytes - held, self.family.device)
        make_fit(plan)
        self._move(plan, replace(self.config, budget=size), self.grid)

    def _move(self, plan: Plan, config: SessionConfig, grid: Grid | None) -> None:
        """Move the memory to another plan, and remember what it was made for."""
        pond, before = self._pond, (self.config, self.grid)
        old = None if pond is None else pond.plan
        try:
            self.config, self.grid = config, grid
            if pond is not None:
                with self.timed("compaction"):
                    self.ask_proxy()
                    pond.resize(plan)
        except BaseException:
            # A move is whole by itself: it has been made, or it has not begun, or it will be finished before anything else.
            if pond is None or (pond.plan is old and not pond.moving):
                self.config, self.grid = before
            raise

    def mark(self, *, queries: bool = False, accumulated_attention: bool = False) -> RunnerMark:
        """Where the stream stands, to `rewind` to; see `Pond.mark`."""
        pond = self.pond.mark(queries=queries, accumulated_attention=accumulated_attention)
        return RunnerMark(replace(self.clock), self.tokens, self.admission_state, pond)

    def rewind(self, mark: RunnerMark) -> None:
        """Put everything back; can be repeated."""
        self.pond.rewind(mark.pond)
        self.clock, self.tokens, self.admission_state = replace(mark.clock), mark.tokens, mark.admission

    def keep_turn(self, mark: RunnerMark) -> None:
        """Count what has run since the mark as part of the stream."""
        self.tokens += self.pond.keep_turn(mark.pond)

    def state(self) -> RunnerState:
        """Everything that the stream goes on with."""
        pond = self.pond.state()  # first: before the first frame this makes the memory, and the prompt moves the clock
        clock, seconds = replace(self.clock), dict(self.seconds)
        stream = self.config.budget, self.grid, clock, self.tokens, self.reanchorings, seconds, self.admission_state
        return RunnerState(*stream, pond)

    def restore(self, state: RunnerState) -> None:
        """Go on, with a memory of its own, where the `state` of a runner with the same settings stood."""
        pond = self._allocate(state.pond.plan)
        pond.restore(state.pond)
        self._pond, self.config, self.grid = pond, replace(self.config, budget=state.budget), state.grid
        self.clock, self.tokens, self.reanchorings = replace(state.clock), state.tokens, state.reanchorings
        self.seconds, self.admission_state = dict(state.seconds), state.admission

    def fork(self) -> Runner:
        """A second runner on a copy of the memory."""
        other = Runner(self.family, self.config)
        other.restore(self.state())
        return other

    @property
    def held_bytes(self) -> int:
        """Bytes held at this instant: by the ledger, and in host memory that no file of its own backs."""
        if (pond := self._pond) is None:
            return 0
        return pond.ledger.held + (0 if pond.host is None or self.config.host_path is not None else pond.host.nbytes)

    def usage(self) -> dict[str, Any]:
        """What `millpond.Usage` shows of it, by its names there."""
        return {
            **self.pond.usage(),
            "full_cache_bytes": self.tokens * self.family.geometry.kv_bytes_per_token,
            "stream_tokens": self.tokens,
            "reanchorings": self.reanchorings,
            **{f"seconds_{stage}": spent for stage, spent in self.seconds.items()},
        }

    def memory(self) -> tuple[LayerMemory, ...]:
        """Time and grid position of every kept token, per layer and head."""
        return tuple(LayerMemory.of(*kept, self.pond.quantized_tokens) for kept in self.pond.kept())


def dated(tokens: Tokens, time_us: int) -> Tokens:
    """Text tokens with the stream time at which they are said."""
    return replace(tokens, time_us=torch.full((len(tokens),), time_us, dtype=torch.long))


def grid_positions(tokens: Tokens, *, text: bool) -> Tensor:
    """int16 [n, 2] as the pond stores them: `TEXT` for a turn, `SEPARATOR` for a frame's tokens that lie on no grid."""
    if text or tokens.visual.numpy().all():
        return tokens.grid_position
    return torch.where(tokens.visual[:, None], tokens.grid_position, torch.tensor(SEPARATOR, dtype=torch.int16))
