"""The pond: all layers of one stream's memory, under one cap.

Appending needs room that `ensure_capacity` makes *before* a block runs; a policy chooses what survives, the pond moves the bytes.
Every allocation goes through the ledger. The pond never sees frames, questions or tokenizers.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from millpond import ops
from millpond.cache.arena import Arena
from millpond.cache.compaction import compact_pond, forget_quantized
from millpond.cache.host import HostCache
from millpond.cache.layer import PondLayer
from millpond.cache.proxy_queries import ProxyQueries
from millpond.cache.resize import resize_pond
from millpond.cache.tier import DequantizationBuffer, MixedPrecisionLayer
from millpond.errors import BudgetError, MillpondError
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.memory.plan import Plan
from millpond.memory.resumable import Move, Steps
from millpond.policies.base import TEXT, Policy, View
from millpond.policies.composition import check
from millpond.positions import Rope

__all__ = ["Pond"]

# The newest text of remembered turns is protected up to this share of the memory; older text competes like everything
# else, so that a long conversation cannot crowd out the video.
_TEXT_SHARE = 4


class Pond(Cache):
    """A `transformers.Cache` of preallocated layers with a hard cap in bytes.

    Args:
        geometry: shapes and dtype of the model's cache.
        plan: the split budget.
        policy: chooses what survives a compaction.
        device: of the storage.
        ledger: the books; made from the plan's budget when not given.

    Attributes:
        queries: what the policy's proxy asked last.
        arena: the layers' common storage, for a policy with layer budgets; None when each layer has its own.
        host: where frames go that are not kept; None where they are forgotten.
        rope: of the model, shown to a policy that turns keys; a session's flow sets it.
        compactions: passes so far.
        evicted: tokens forgotten so far (per head; all heads forget equally many).
    """

    copies = True
    """What a forward gives it is copied into its own storage, so a decoder may run in inference mode."""

    def __init__(
        self, geometry: Geometry, plan: Plan, policy: Policy, device: torch.device, ledger: Ledger | None = None
    ) -> None:
        self.geometry = geometry = replace(geometry, accumulated_attention=policy.needs.accumulated_attention)
        self.plan = plan
        self.policy = policy
        self.device = device
        self.ledger = ledger if ledger is not None else Ledger(plan.budget if policy.capped else None, plan.lines)
        self.ledger.hold("storage", plan.slots * geometry.bytes_per_token + plan.quantized_bytes)
        self.ledger.hold("queries", plan.query_bytes)
        self.queries = ProxyQueries(geometry, plan.query_bytes // geometry.query_bytes, device)
        check(policy)
        tier = policy.needs.quantized_tier
        self.dequantization_buffer = DequantizationBuffer(geometry, plan, tier, device, self.ledger) if tier else None
        super().__init__(layers=[self._layer() for _ in range(geometry.layers)])
        self.arena = Arena(self.layers, [plan.slots] * geometry.layers) if policy.needs.layer_share > 1 else None
        self._ahead = [0] * geometry.layers  # how many tokens more than the first layer each one holds
        self.host: HostCache | None = None
        self.rope: Rope | None = None
        self.compactions = 0
        self.evicted = 0
        self._text: int | None = None  # newest text tokens that are whole in every head; None while there was no text
        self._recent: deque[tuple[int, int]] = deque()  # (time_us, tokens) of the latest groups, newest last
        self._move: Move | None = None  # that has begun and is not finished

    def _layer(self) -> PondLayer:
        if self.dequantization_buffer is None:
            own = self.plan.slots if self.policy.needs.layer_share == 1 else 0  # else the arena's
            return PondLayer(self.geometry, own, self.device)
        groups = self.plan.quantized_tokens // self.dequantization_buffer.tier.quantizer.group
        return MixedPrecisionLayer(self.geometry, self.plan.slots, groups, self.dequantization_buffer, self.device)

    @property
    def length(self) -> int:
        """Live slots of the first layer; between forwards the same in every layer, but for a policy with layer budgets."""
        length: int = self.layers[0].length
        return length

    @property
    def capacity(self) -> int:
        """Slots allocated, on average over the layers."""
        return self.plan.slots

    @property
    def free(self) -> int:
        """Slots not in use, in the layer that has fewest."""
        return min(int(layer.capacity - layer.length) for layer in self.layers)

    @property
    def uneven(self) -> bool:
        """Whether layers hold different numbers of tokens, so that each needs a mask of its own."""
        return any(self._ahead)

    @property
    def memory_tokens(self) -> int:
        """Live tokens behind the pinned prompt, packed ones included; on average over the layers, rounded down."""
        return self.full_precision_tokens + self.quantized_tokens

    @property
    def full_precision_tokens(self) -> int:
        """Those of them that are stored as they came."""
        return max(0, self.length + sum(self._ahead) // len(self._ahead) - self.plan.prompt_tokens)

    @property
    def quantized_tokens(self) -> int:
        """Those of them that are stored in few bits."""
        first = self.layers[0]
        return first.quantized_store.tokens if isinstance(first, MixedPrecisionLayer) else 0

    @property
    def moving(self) -> bool:
        """Whether a move has begun and is still to be finished."""
        return self._move is not None

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, metadata included."""
        return self.arena.nbytes if self.arena else sum(layer.nbytes for layer in self.layers)

    @property
    def live_bytes(self) -> int:
        """Bytes that the live tokens take."""
        quantized = (
            self.dequantization_buffer.tier.quantized_bytes(self.geometry, self.quantized_tokens)
            if self.dequantization_buffer
            else 0
        )
        live: int = sum(layer.length for layer in self.layers)
        return live * self.geometry.bytes_per_token // len(self.layers) + quantized

    # --- growing ------------------------------------------------------------------------------------------------

    def ensure_capacity(self, tokens: int) -> None:
        """Make room for a block of `tokens` stream tokens beside the turn's reserve: the cap holds before it runs.

        Raises:
            BudgetError: the block cannot fit even into an empty memory; nothing was forgotten.
        """
        overrun = self.overrun(tokens)
        if overrun <= 0:
            return
        if not self.policy.capped:
            self.resize(self.plan.with_slots(self.capacity + max(overrun, self.capacity // 2)))
            return
        slots = min(self.plan.memory_tokens, self.full_precision_tokens - overrun)
        if slots < 1:
            self._refuse(f"a block of {tokens} tokens", tokens + self.plan.prompt_tokens + self.plan.group_tokens)
        self.compact(slots)

    def overrun(self, tokens: int) -> int:
        """Slots by which a block of `tokens` stream tokens would reach into the turn's reserve; then `ensure_capacity` compacts."""
        self.finish()
        free: int = self.free
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
        minimum = (plan.budget or 0) + max(1, slots + plan.reserve_tokens - self.capacity) * plan.bytes_per_token
        raise BudgetError(
            f"{what} does not fit into the budget of {plan.budget} bytes: about {minimum} would do", minimum=minimum
        )

    def write_metadata(self, time_us: Tensor, grid_position: Tensor, positions: Tensor) -> None:
        """Write the metadata of the block that the next forward appends.

        Args:
            time_us: int64 [n], stream time of each token; tokens of one frame group share theirs.
            place: int16 [n, 2], see `millpond.policies.base`.
            positions: int [axes, n] rotary positions.
        """
        self.finish()
        count = time_us.shape[0]
        if count > self.free:
            raise BudgetError(f"a block of {count} tokens was not admitted: {self.free} slots are free")
        time_us, grid_position = time_us.to(self.device), grid_position.to(self.device)
        ops.write_metadata(
            time_us, grid_position, positions.T.to(self.device), [layer.metadata() for layer in self.layers]
        )

    def commit(self, time_us: Tensor, grid_position: Tensor) -> None:
        """Count a block that has run as part of the stream: its groups become the latest, its text protected.

        Args:
            time_us: int64 [n]. place: int16 [n, 2]. On the CPU; as announced.
        """
        recent, said = self._recent.copy(), self._text
        shown = grid_position[:, 0] != TEXT
        text = int(len(shown) - shown.sum())
        if text:
            said = (said or 0) + text
            time_us = time_us[shown]
        for time, run in groupby(time_us.tolist()):
            count = sum(1 for _ in run)
            if recent and recent[-1][0] == time:
                count += recent.pop()[1]
            recent.append((time, count))
        # Groups beyond what the memory could hold can never be protected again.
        held = sum(count for _, count in recent)
        while len(recent) > 1 and held - recent[0][1] >= self.plan.slots:
            held -= recent.popleft()[1]
        self.__dict__.update(_recent=recent, _text=said)

    def truncate(self, length: int) -> None:
        """Forget everything from slot `length` of the first layer on: the end of a turn that is not remembered, or a failed block."""
        self.finish()
        lengths = [min(layer.length, length + ahead) for layer, ahead in zip(self.layers, self._ahead, strict=True)]
        self.carry_out(Steps(partial(layer.settle, each) for layer, each in zip(self.layers, lengths, strict=True)))

    def cut(self, start: int, count: int) -> None:
        """Take `count` slots from slot `start` of the first layer on out of every layer; what lies behind them moves down."""
        self.finish()
        if not count:
            return
        behind = torch.arange(count, self.length - start, device=self.device).repeat(self.geometry.kv_heads, 1)
        steps: list[Callable[[], None]] = []
        for layer, ahead in zip(self.layers, self._ahead, strict=True):
            steps += layer.compaction(behind, start + ahead, self.plan.chunk)
        with self.ledger.borrow("scratch", self.plan.scratch_bytes):
            self.carry_out(Steps(steps))

    # --- moves --------------------------------------------------------------------------------------------------

    def carry_out(self, move: Move) -> None:
        """Carry a prepared move out: once begun it is finished, also when it is interrupted, before the interruption goes on."""
        try:
            self._move = move
            move.run()
            self._move = None
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what they worked on goes: its bytes are needed again
            with suppress(Exception):  # what `finish` says then is said by every call from now on
                self.finish()
            raise

    def finish(self) -> None:
        """Finish a move that was interrupted, if one was; everything that reads or changes the memory begins with it.

        Raises:
            MillpondError: it cannot be finished, for want of memory most likely. The next call tries again.
        """
        if self._move is None:
            return
        try:
            self._move.run()
        except Exception as error:
            raise MillpondError(
                f"the memory cannot be used: it was interrupted while it moved, and going on fails ({error}); every call tries again"
            ) from error
        self._move = None

    # --- shrinking ----------------------------------------------------------------------------------------------

    def compact(self, slots: int) -> None:
        """Keep `slots` tokens behind the prompt in every head of every layer, chosen by the policy, in place.

        With a low-bit tier that many stay in full, or up to a group fewer; the others are packed, and as many packed ones are
        forgotten as there is no room for.

        With layer budgets `slots` is the mean over the layers, whose regions are cut anew to what each was granted.

        Raises:
            PolicyError: the policy failed or broke its contract; nothing has moved. Only where its `merge` fails, and fails again, is
                the pass finished, and what had not been merged by then is forgotten without a trace.
        """
        compact_pond(self, slots)

    def forget_quantized(self, groups: int) -> None:
        """Keep at most `groups` packed groups in every head of every layer.

        Raises:
            PolicyError: the policy failed; nothing has moved.
        """
        forget_quantized(self, groups)

    def _protect(self, slots: int) -> tuple[int, int]:
        """The stream time from which frames are protected, and how many of the newest text tokens are."""
        text = min(self._text or 0, slots // _TEXT_SHARE)
        if not self._recent:
            return torch.iinfo(torch.int64).max, text
        frames = max(1, self.full_precision_tokens // self._recent[-1][1])
        held, since = 0, self._recent[-1][0] + 1
        for time, count in list(self._recent)[: -max(1, self.policy.recent(frames)) - 1 : -1]:
            if held + count + text > slots:
                break
            held += count
            since = time
        return since, text

    def _view(self, index: int, layer: PondLayer, since: int, text: int) -> View:
        start, end = self.plan.prompt_tokens, layer.length
        keys, values, time_us, grid_position, positions, *accumulated_attention = (
            tensor.narrow(1, start, end - start) for tensor in layer.tensors()
        )
        protected = time_us >= since
        if self._text is not None:
            for head in range(protected.shape[0]):
                said = grid_position[head, :, 0] == TEXT
                # Text is protected by its rank from the end, not by time: a whole turn shares one time.
                after = said.sum() - said.cumsum(0)
                protected[head] &= ~said
                protected[head] |= said & (after < text)
        block = self._recent[-1][1] if self._recent else 1
        return View(
            keys,
            values,
            time_us,
            grid_position,
            protected,
            index,
            len(self.layers),
            block,
            self.plan.chunk,
            queries=self.queries.layer(index) if self.policy.needs.proxy else None,
            prompt_keys=layer.keys[0, :, :start] if self.policy.needs.proxy else None,
            accumulated_attention=accumulated_attention[0] if accumulated_attention else None,
            positions=positions if self.policy.needs.positions else None,
            rope=self.rope if self.policy.needs.positions else None,
        )

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer, stream times int64 [H, n] and places int16 [H, n, 2] of the live tokens behind the prompt.

        Packed ones come first, in the order in which they were packed.
        """
        self.finish()
        start = self.plan.prompt_tokens
        for layer in self.layers:
            time_us, grid_position = (
                layer.time_us[:, start : layer.length],
                layer.grid_position[:, start : layer.length],
            )
            if isinstance(layer, MixedPrecisionLayer):
                time_us = torch.cat([layer.quantized_store.live("time_us"), time_us], dim=1)
                grid_position = torch.cat([layer.quantized_store.live("grid_position"), grid_position], dim=1)
            yield time_us, grid_position

    def timestamps(self) -> int:
        """Distinct times of frame groups of which some head of some layer still holds a token."""
        found: set[int] = set()
        for times, grid_position in self.kept():
            for head in range(times.shape[0]):
                found.update(times[head][grid_position[head, :, 0] != TEXT].unique_consecutive().tolist())
        return len(found)

    # --- storage ------------------------------------------------------------------------------------------------

    def resize(self, plan: Plan) -> None:
        """Move to the storage of another plan while the stream runs; shrinking compacts at once.

        While it moves, the larger of the two budgets is the cap; afterwards the new one.

        Raises:
            BudgetError: the new plan cannot hold what must survive, or the machine has no such memory; the plan stays as it was, and
                so does the memory, but for what was forgotten to make it smaller.
        """
        resize_pond(self, plan)

    def fork(self) -> Pond:
        """A second pond with a copy of the memory and books of its own."""
        self.finish()
        other = Pond(self.geometry, self.plan, self.policy, self.device)
        if self.arena and other.arena:
            Steps(other.arena.cutting(self.arena.capacities, [0] * len(self.layers), self.plan.chunk)).run()
        for mine, copy in zip(self.layers, other.layers, strict=True):
            copy.adopt(mine)
        other._ahead = list(self._ahead)
        other.compactions, other.evicted, other._text = self.compactions, self.evicted, self._text
        other._recent = self._recent.copy()
        other.queries.adopt(self.queries)
        other.host = None if self.host is None else self.host.fork()
        other.rope = self.rope
        return other
