"""The pond: all layers of one stream's memory, under one cap.

Appending needs slots that `ensure_capacity` frees *before* a block runs; a policy chooses what survives, the pond moves the bytes.
Every allocation goes through the ledger. The pond never sees frames, questions or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from millpond.cache.compaction import choose_groups, choose_tokens
from millpond.cache.compaction_state import CompactionState
from millpond.cache.host import HostCache, HostCacheState
from millpond.cache.plan import Plan
from millpond.cache.proxy_queries import ProxyQueries, QueriesState, accumulate_attention
from millpond.cache.recent import RecentWindow
from millpond.cache.resize import Resizing, most_tokens, reachable
from millpond.cache.storage import make_storage
from millpond.cache.storage.base import StorageState
from millpond.cache.turn_slots import TakingTurns
from millpond.errors import BudgetError
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Steps
from millpond.policies.base import TEXT, Policy, View
from millpond.policies.composition import check
from millpond.positions import Rope


@dataclass(frozen=True, eq=False)
class PondState:
    """Everything that a stream's memory goes on with. Its tensors are views of the pond that gave it.

    Attributes:
        plan: how the budget is split. storage, queries, host: the tokens; the proxy's queries; host memory, None without any.
        recent, compactions, evicted: as in `Pond`.
    """

    plan: Plan
    storage: StorageState
    queries: QueriesState
    host: HostCacheState | None
    recent: RecentWindow
    compactions: int
    evicted: int


@dataclass(frozen=True, eq=False)
class Mark:
    """Where a step of a stream began: what is needed to take back what it appends.

    Attributes:
        length: live slots of the first layer. recent: as in the pond.
        queries, accumulated_attention: copies of what a forward changes in place; None and empty where it does not.
    """

    length: int
    recent: RecentWindow
    queries: QueriesState | None
    accumulated_attention: tuple[Tensor, ...]


class Pond(TakingTurns, Cache):
    """A `transformers.Cache` of preallocated layers with a hard cap in bytes.

    Args:
        geometry: shapes and dtype of the model's cache. plan: the split budget.
        policy: chooses what survives a compaction. device: of the storage.

    Attributes:
        ledger: who holds how many bytes of the cap.
        storage: where the tokens lie, of the kind that the policy needs.
        queries: what the policy's proxy asked last.
        recent: what of the stream's newest part can still be protected.
        host: where frames go that are not kept; None where they are forgotten.
        rope: of the model, shown to a policy that rerotates keys; a session's runner sets it.
        compactions: passes so far. evicted: tokens forgotten so far (per head; all heads forget equally many).
    """

    copies = True
    """What a forward gives it is copied into its own storage, so a decoder may run in inference mode."""

    def __init__(self, geometry: Geometry, plan: Plan, policy: Policy, device: torch.device) -> None:
        self.geometry = geometry = replace(geometry, accumulated_attention=policy.needs.accumulated_attention)
        self.plan = plan
        self.policy = policy
        self.device = device
        self.ledger = Ledger(plan.budget if policy.capped else None, plan.lines)
        check(policy)
        self.storage = make_storage(policy, geometry, plan, device, self.ledger)
        super().__init__(layers=list(self.storage.layers))
        self.ledger.hold("queries", plan.query_bytes)
        self.queries = ProxyQueries(geometry, plan.query_bytes // geometry.query_bytes, device)
        self.recent = RecentWindow()
        self.host: HostCache | None = None
        self.rope: Rope | None = None
        self.compactions = 0
        self.evicted = 0

    @property
    def uneven(self) -> bool:
        """Whether layers hold different numbers of tokens, so that each needs a mask of its own."""
        return self.storage.uneven

    @property
    def memory_tokens(self) -> int:
        """Live tokens behind the pinned prompt, quantized ones included; on average over the layers, rounded down."""
        return self.full_precision_tokens + self.quantized_tokens

    @property
    def full_precision_tokens(self) -> int:
        """Those of them that are stored as they came."""
        return max(0, self.storage.mean_length + self.stream_length - self.length - self.plan.prompt_tokens)

    @property
    def quantized_tokens(self) -> int:
        """Those of them that are stored in few bits."""
        return self.storage.quantized_tokens

    def ensure_capacity(self, tokens: int) -> None:
        """Free slots for a block of `tokens` stream tokens beside the turn's reserve: the cap holds before it runs.

        Raises:
            BudgetError: the block cannot fit even into an empty memory; nothing was forgotten.
        """
        overrun = self.overrun(tokens)
        if overrun <= 0:
            return
        if not self.policy.capped:
            self.resize(self.plan.with_slots(self.plan.slots + max(overrun, self.plan.slots // 2)))
            return
        slots = min(self.plan.memory_tokens, self.full_precision_tokens - overrun)
        if slots < 1:
            self._refuse(f"a block of {tokens} tokens", tokens + self.plan.prompt_tokens + self.plan.group_tokens)
        self.compact(slots)

    def overrun(self, tokens: int) -> int:
        """Slots by which a block of `tokens` stream tokens would reach into the turn's reserve; then `ensure_capacity` compacts."""
        self.finish()
        free: int = self.stream_free
        return tokens + self.plan.reserve_tokens - free

    def ensure_turn_capacity(self, tokens: int) -> None:
        """Make sure that `tokens` tokens of a question and its answer fit; the stream's memory stays as it is.

        Raises:
            BudgetError: they do not fit into the free slots.
        """
        self.finish()
        if tokens <= self.free:
            return
        if not self.policy.capped:
            self.resize(self.plan.with_slots(self.length + tokens + self.plan.reserve_tokens))
            return
        self._refuse(f"a turn of {tokens} tokens ({self.free} slots are free)", self.length + tokens)

    def _refuse(self, what: str, slots: int) -> None:
        # An estimate from above: a plan with that many more slots in its reserve.
        plan = self.plan
        minimum = (plan.budget or 0) + max(1, slots + plan.reserve_tokens - self.plan.slots) * plan.bytes_per_token
        raise BudgetError(
            f"{what} does not fit into the budget of {plan.budget} bytes: about {minimum} would do", minimum=minimum
        )

    def write_metadata(self, time_us: Tensor, grid_position: Tensor, positions: Tensor) -> None:
        """Write the metadata of the block that the next forward appends.

        Args:
            time_us: int64 [n], stream time of each token; tokens of one frame group share theirs.
            grid_position: int16 [n, 2], see `millpond.policies.base`.
            positions: int [axes, n] rotary positions.
        """
        self.finish()
        count = time_us.shape[0]
        if count > self.free:
            raise BudgetError(f"a block of {count} tokens has no capacity ensured: {self.free} slots are free")
        self.storage.write_metadata(time_us.to(self.device), grid_position.to(self.device), positions.T.to(self.device))

    def commit(self, time_us: Tensor, grid_position: Tensor) -> None:
        """Count a block that has run as part of the stream: its groups become the latest, its text protected.

        Args:
            time_us: int64 [n]. grid_position: int16 [n, 2]. On the CPU; as in `write_metadata`.
        """
        self.recent = self.recent.with_block(time_us, grid_position, self.plan.slots)

    def accumulate_attention(self, index: int, queries: Tensor, positions: Tensor) -> None:
        """Add to each live token's sum in one layer the attention that the block just run pays it; see `proxy_queries.accumulate_attention`."""
        assert self.rope is not None
        with self.ledger.borrow("scratch", self.plan.scratch_bytes):
            layer, groups = self.layers[index], self.geometry.kv_groups
            accumulate_attention(layer, groups, queries, positions, self.rope, self.plan.chunk)

    def truncate(self, length: int) -> None:
        """Forget everything from slot `length` of the first layer on: the end of a turn that is not remembered, or a failed block."""
        self.finish()
        self.carry_out(Steps(self.storage.truncating(length)))

    def cut(self, start: int, count: int) -> None:
        """Take `count` slots from slot `start` of the first layer on out of every layer; what lies behind them moves down."""
        self.expect_no_turn()
        if count:
            with self.ledger.borrow("scratch", self.plan.scratch_bytes):
                self.carry_out(Steps(self.storage.cutting_out(start, count, self.plan.chunk)))

    def mark(self, *, queries: bool = False, accumulated_attention: bool = False) -> Mark:
        """Remember what there is, to `rewind` to it until `release`.

        What is appended lies behind it and need not be copied. What changes in place is: with `queries` those that were noted, with
        `accumulated_attention` the attention summed up; the plan counts that as `undo_bytes`.
        """
        self.finish()
        self.ledger.hold("undo", self.plan.undo_bytes)
        noted = self.queries.state() if queries and self.plan.query_bytes else None
        noted = None if noted is None else replace(noted, rows=noted.rows.clone())
        summed = accumulated_attention and self.geometry.accumulated_attention
        live = self.storage.accumulated(self.length) if summed else []
        return Mark(self.length, self.recent, noted, tuple(each.clone() for each in live))

    def rewind(self, mark: Mark) -> None:
        """Put back what there was; nothing may have been compacted since. Can be repeated."""
        self.truncate(mark.length)
        self.recent = mark.recent
        if mark.queries is not None:
            self.queries.restore(mark.queries)
        if saved := mark.accumulated_attention:
            for live, copy in zip(self.storage.accumulated(mark.length), saved, strict=True):
                live.copy_(copy)

    def keep_turn(self, mark: Mark) -> int:
        """Count everything behind the mark as part of the stream; returns how many tokens."""
        first = self.storage.layers[0]  # a turn is the same in every head until it is compacted
        turn = slice(mark.length, self.length)
        self.commit(first.time_us[0, turn].cpu(), first.grid_position[0, turn].cpu())
        return turn.stop - turn.start

    def release(self) -> None:
        """The bytes that a mark's copies took are free: whoever had it has let go of it."""
        self.ledger.hold("undo", 0)

    def compact(self, slots: int) -> None:
        """Keep `slots` tokens behind the prompt in every head of every layer, chosen by the policy, in place.

        With a low-bit tier that many stay in full, or up to a group fewer; the others are quantized, and as many quantized ones
        are forgotten as do not fit.

        With layer budgets `slots` is the mean over the layers, whose regions are cut anew to what each was granted.

        Raises:
            PolicyError: the policy failed or broke its contract; nothing has moved. Only where its `merge` fails, and fails again, is
                the pass finished, and what had not been merged by then is forgotten without a trace.
        """
        self.expect_no_turn()
        for target in self.storage.targets(self.plan, self.full_precision_tokens, slots):
            if move := choose_tokens(self._compaction(1), target):
                self.carry_out(move)

    def forget_quantized(self, groups: int) -> None:
        """Keep at most `groups` quantized groups in every head of every layer.

        Raises:
            PolicyError: the policy failed; nothing has moved.
        """
        self.expect_no_turn()
        if move := choose_groups(self._compaction(0), groups):
            self.carry_out(move)

    def views(self, slots: int) -> Iterator[View]:
        """Each layer's memory as the policy would be shown it to keep `slots` tokens."""
        self.expect_no_turn()
        at = self._compaction(0)
        protected = at.protect(slots)
        return (at.view(index, protected) for index in range(len(self.layers)))

    def _compaction(self, passes: int) -> CompactionState:
        count = partial(self._count_pass, self.compactions + passes, self.evicted + self.memory_tokens)
        parts = self.storage, self.plan, self.policy, self.ledger, self.recent, self.queries, self.host, self.rope
        return CompactionState(*parts, count)

    def _count_pass(self, compactions: int, ever: int, recent: RecentWindow) -> None:
        """Counts after a pass. Of `ever` tokens that had been evicted or were in memory, those not in memory now have been evicted."""
        self.recent, self.compactions, self.evicted = recent, compactions, ever - self.memory_tokens

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer, stream times int64 [H, n] and grid positions int16 [H, n, 2] of the live tokens behind the prompt.

        Quantized ones come first, in the order in which they were quantized. A turn with slots of its own is no part of it.
        """
        self.bring_stream()
        return (layer.kept(self.plan.prompt_tokens) for layer in self.storage.layers)

    def timestamps(self) -> int:
        """Distinct times of frame groups of which some head of some layer still holds a token."""
        found: set[int] = set()
        for times, grid_position in self.kept():
            for head in range(times.shape[0]):
                found.update(times[head][grid_position[head, :, 0] != TEXT].unique_consecutive().tolist())
        return len(found)

    def usage(self) -> dict[str, Any]:
        """What `millpond.Usage` shows of it, by its names there."""
        self.finish()
        parked = 0 if self.turn is None else self.turn.parked * self.plan.bytes_per_token
        return {
            "budget_bytes": self.plan.budget,
            "live_bytes": self.storage.live_bytes + parked,
            "allocated_bytes": self.ledger.held,
            "peak_bytes": self.ledger.peak,
            "timestamps_kept": self.timestamps(),
            "memory_tokens": self.memory_tokens,
            "evicted_tokens": self.evicted,
            "compactions": self.compactions,
            **({} if self.host is None else self.host.usage()),
        }

    def resize(self, plan: Plan) -> None:
        """Move to the storage of another plan while the stream runs; shrinking compacts at once.

        While it moves, the larger of the two budgets is the cap; afterwards the new one.

        Raises:
            BudgetError: the new plan cannot hold what must survive, or the machine has no such memory; the plan stays as it was, and
                so does the memory, but for what was forgotten to make it smaller.
        """
        self.expect_no_turn()
        old, storage, ledger = self.plan, self.storage, self.ledger
        limit = max(old.budget or 0, plan.budget or 0) if self.policy.capped else None
        if plan.slots < old.slots:
            self.compact(most_tokens(storage, ledger, old, plan, limit))
        self.forget_quantized(storage.groups_of(plan))
        move = Resizing(storage, ledger, old, reachable(storage, ledger, old, plan, limit), limit, self._adopt)
        self.carry_out(move)
        if move.refused is not None:
            raise move.refused

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.ledger.adopt(plan.budget if self.policy.capped else None, plan.lines)

    def state(self) -> PondState:
        """Everything that the stream's memory goes on with."""
        self.expect_no_turn()
        host = None if self.host is None else self.host.state()
        tensors = self.storage.state(), self.queries.state(), host
        return PondState(self.plan, *tensors, self.recent, self.compactions, self.evicted)

    def restore(self, state: PondState) -> None:
        """Become what the `state` of a pond says that was made for the same model, plan and policy; its tensors are copied."""
        self.storage.restore(state.storage)
        self.queries.restore(state.queries)
        if self.host is not None and state.host is not None:
            self.host.restore(state.host)
        self.recent, self.compactions, self.evicted = state.recent, state.compactions, state.evicted
