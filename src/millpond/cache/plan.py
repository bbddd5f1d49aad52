"""How a budget in bytes is split: first its slots, then what is taken beside them, a line for every consumer.

    slots = prompt + reserve (turn, recent frames, retrieved frames, ...) + headroom + memory |C|
    bytes = the sum of the lines  <=  budget

Arithmetic only; nothing is allocated here. Consumers beside those that every cache has are functions that give a line each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.geometry import Geometry
from millpond.memory.lines import Line, slot_line

if TYPE_CHECKING:
    from millpond.policies.base import Policy

# Compaction runs when the headroom is used up, so a larger one means fewer passes and a smaller memory. An eighth keeps
# selection below half a per cent of ingest at a 7B model's shapes (bench/overhead.py) and memory at 7/8 of what it could be.
_HEADROOM_SHARE = 8
# A turn (question and answer) gets an eighth of the slots, within what real questions and answers need.
_RESERVE_SHARE, _RESERVE_MIN, _RESERVE_MAX = 8, 32, 512
# Groups that run through the model together: large blocks feed the matrix units, small ones cost less headroom.
_BLOCK_GROUPS = (4, 2, 1)
_CHUNK_MIN, _CHUNK_MAX = 16, 512
_STRAIGHT_TRIES = 8


@dataclass(frozen=True)
class Split:
    """How the slots are split, as far as it is known when a consumer is asked: the reserve grows by one consumer after another, and
    those of bytes alone see all of it.

    Attributes:
        policy: chooses what survives.
        slots: to be split.
        prompt_tokens, group_tokens, frames_per_group, proxy_tokens: as given to `split_budget`.
        claims: of the reserve so far.
        headroom_tokens: kept free for the frames to come.
        block_groups: frame groups that run through the model at once.
        chunk: tokens of one head worked on at a time.
        quantized_tokens: remembered in few bits, beside the slots.
    """

    policy: Policy
    slots: int
    prompt_tokens: int
    group_tokens: int
    frames_per_group: int
    proxy_tokens: int
    claims: tuple[Line, ...] = ()
    headroom_tokens: int = 0
    block_groups: int = 0
    chunk: int = 0
    quantized_tokens: int = 0

    def claimed(self, name: str) -> int:
        """Slots of the reserve that go to one consumer."""
        return sum(line.slots for line in self.claims if line.name == name)

    @property
    def reserve_tokens(self) -> int:
        """Slots kept free for what runs behind the memory."""
        return sum(line.slots for line in self.claims)

    @property
    def left(self) -> int:
        """Slots that nobody has claimed yet; at last the memory's."""
        return self.slots - self.prompt_tokens - self.reserve_tokens - self.headroom_tokens


Consumer = Callable[[Geometry, Split], Line]
"""A consumer of the budget: gives its line, from the cache's shapes and the split so far. What it gives must not shrink when the slots grow."""


class _Total:
    """A number that is read off a plan's lines, once: the slots or bytes of those called so, or under such an account."""

    def __init__(self, what: str, name: str) -> None:
        self._what, self._name = what, name

    def __set_name__(self, owner: type[Plan], attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, plan: Plan | None, kind: type[Plan]) -> int:
        if plan is None:
            raise AttributeError("a number of one plan, not of all")
        found: int = sum(getattr(line, self._what) for line in plan.lines if self._name in (line.name, line.account))
        plan.__dict__[self._attribute] = found  # which is looked at first from now on; a plan never changes
        return found


@dataclass(frozen=True)
class Plan:
    """A budget, split.

    Attributes:
        budget: the cap in bytes; None for the uncapped reference, whose storage grows.
        bytes_per_token: keys, values and metadata of one token over all layers.
        lines: what every consumer may take. All other numbers of slots and bytes are read off them: those in tokens are slots,
            `headroom_tokens` the headroom, `retrieved_tokens` what a question retrieves, `quantized_bytes` the quantized store, `dequantization_bytes` the
            dequantization buffer, `state_bytes` an admission's, `recent_bytes` the latest frames' pixels.
        group_tokens, frames_per_group: size of one frame group.
        block_groups: frame groups that run through the model at once.
        chunk: tokens of one head worked on at a time.
        quantized_tokens: tokens that are remembered in few bits, beside the slots.

    Raises:
        BudgetError: the lines cannot all be taken at once.
    """

    budget: int | None
    bytes_per_token: int
    lines: tuple[Line, ...]
    group_tokens: int
    frames_per_group: int
    block_groups: int
    chunk: int
    quantized_tokens: int = 0

    def __post_init__(self) -> None:
        names = [line.name for line in self.lines]
        for line in self.lines:
            if names.count(line.name) > 1:
                raise BudgetError(f"two lines of the budget are called {line.name!r}")
            if line.slots < 0 or line.bytes < 0:
                raise BudgetError(f"the line {line.name!r} is negative: {line.slots} slots, {line.bytes} bytes")
        if self.budget is not None and self.total_bytes > self.budget:
            raise BudgetError(f"the lines take {self.total_bytes} bytes of a budget of {self.budget}")

    prompt_tokens = _Total("slots", "prompt")
    memory_tokens = _Total("slots", "memory")
    headroom_tokens = _Total("slots", "headroom")
    turn_tokens = _Total("slots", "turn")
    recent_tokens = _Total("slots", "recent frames")
    retrieved_tokens = _Total("slots", "retrieved frames")
    quantized_bytes = _Total("bytes", "quantized store")
    dequantization_bytes = _Total("bytes", "dequantization buffer")
    query_bytes = _Total("bytes", "queries")
    undo_bytes = _Total("bytes", "undo")
    scratch_bytes = _Total("bytes", "scratch")
    waiting_bytes = _Total("bytes", "waiting frames")
    recent_bytes = _Total("bytes", "recent pixels")
    state_bytes = _Total("bytes", "admission")

    @property
    def slots(self) -> int:
        """Token slots allocated."""
        return sum(line.slots for line in self.lines)

    @property
    def total_bytes(self) -> int:
        """Everything the plan may hold at once; at most the budget."""
        return sum(line.bytes for line in self.lines)

    @property
    def reserve_tokens(self) -> int:
        """Slots kept free for a question, its answer, what it retrieves and the recent frames."""
        return self.slots - self.prompt_tokens - self.memory_tokens - self.headroom_tokens

    @property
    def block_tokens(self) -> int:
        """What runs through the model at once."""
        return self.block_groups * self.group_tokens

    @property
    def retrieved_frames(self) -> int:
        """Frame groups that a question retrieves from host memory."""
        return self.retrieved_tokens // self.group_tokens

    @property
    def frames_in_full(self) -> int:
        """Raw frames that the memory holds when it keeps every one of their tokens."""
        return (self.memory_tokens + self.quantized_tokens) // self.group_tokens * self.frames_per_group

    def seconds_in_full(self, fps: float) -> float:
        """Seconds of video at `fps` that fit into the memory in full detail."""
        return self.frames_in_full / fps

    def with_slots(self, slots: int) -> Plan:
        """The same plan on other storage, of `slots` slots: the memory takes the difference, but is never less than a group."""
        memory = max(self.group_tokens, self.memory_tokens + slots - self.slots)
        tokens = {"memory": memory, "headroom": slots - self.prompt_tokens - self.reserve_tokens - memory}
        lines = list(self.lines)
        for at, line in enumerate(lines):
            if line.name in tokens:
                lines[at] = replace(line, slots=tokens[line.name], bytes=tokens[line.name] * self.bytes_per_token)
        return replace(self, lines=tuple(lines))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for `--json`."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        read = {name: getattr(self, name) for name, kind in vars(Plan).items() if isinstance(kind, _Total | property)}
        return {**plain, **read, "lines": [line.to_dict() for line in self.lines]}


def split_budget(
    budget: int | None,
    geometry: Geometry,
    policy: Policy,
    *,
    prompt_tokens: int,
    group_tokens: int = 1,
    frames_per_group: int = 1,
    reserve_tokens: int | None = None,
    proxy_tokens: int = 0,
    reserve: Sequence[Consumer] = (),
    beside: Sequence[Consumer] = (),
    what: str = "this model",
) -> Plan:
    """Split `budget` bytes for a model and a frame size.

    Args:
        budget: bytes; None only for a policy without a cap, to which any says nothing.
        prompt_tokens: pinned tokens.
        group_tokens, frames_per_group: one frame group in tokens and raw frames.
        reserve_tokens: slots kept free for a turn; by default an eighth of all, between 32 and 512.
        proxy_tokens: length of the text that a policy with the proxy "prompt" is shown; a turn's slots are never fewer.
        reserve: consumers of slots beside a turn's, in the order in which they claim them.
        beside: consumers of bytes alone.
        what: named in errors.

    Raises:
        BudgetError: too small; names the minimum that works. Or a consumer's line cannot be.
    """
    geometry = replace(geometry, accumulated_attention=policy.needs.accumulated_attention)
    proxy_tokens = proxy_tokens if policy.needs.proxy == "prompt" else 0
    start = Split(policy, 0, prompt_tokens, group_tokens, frames_per_group, proxy_tokens)
    claimants: list[Consumer] = [partial(_turn, reserve_tokens), *reserve]

    def claimed(split: Split) -> Split:
        for claim in claimants:
            split = replace(split, claims=(*split.claims, claim(geometry, split)))
        return split

    def split(slots: int) -> tuple[Split, tuple[Line, ...]]:
        shares = _shared(claimed(replace(start, slots=slots)))
        pinned = slot_line(geometry, "prompt", prompt_tokens, "pinned")
        rest = (pinned, _memory(geometry, shares), _headroom(geometry, shares), *shares.claims)
        return shares, (*rest, *(consumer(geometry, shares) for consumer in beside))

    def total(slots: int) -> int:
        return sum(line.bytes for line in split(slots)[1])

    def made(slots: int) -> Plan:
        shares, lines = split(slots)
        if sum(line.slots for line in lines) != slots:
            raise BudgetError(f"the lines take {sum(line.slots for line in lines)} slots of {slots}")
        block = group_tokens, frames_per_group, shares.block_groups, shares.chunk
        cap = budget if policy.capped else None
        return Plan(cap, geometry.bytes_per_token, lines, *block, shares.quantized_tokens)

    fewest = claimed(start).reserve_tokens
    if not policy.capped:
        turn = _turn(reserve_tokens, geometry, start).slots
        return made(prompt_tokens + (reserve_tokens or _RESERVE_MAX) + fewest - turn + 8 * group_tokens)
    if budget is None:
        raise BudgetError(f"the policy {policy.name!r} needs a budget; only 'full' runs without one")
    # The minimum that works: one group remembered, one coming in, and the reserve.
    fewest += prompt_tokens + 2 * group_tokens
    tier, remembered = policy.needs.quantized_tier, policy.minimum_memory(group_tokens)
    # Tokens are quantized by whole groups, so up to a group less one leave beside those that must.
    remembered += tier.quantizer.group - 1 if tier else 0
    fewest = _first(lambda slots: _shared(claimed(replace(start, slots=slots))).left >= remembered, fewest)
    minimum = total(fewest)
    if budget < minimum:
        raise BudgetError(
            f"a budget of {format_bytes(budget)} is too small for {what}: the minimum that works is {minimum} bytes "
            f"({format_bytes(minimum)}; {prompt_tokens} prompt tokens, {group_tokens} tokens a frame group, "
            f"{geometry.bytes_per_token} bytes a token)",
            minimum=minimum,
        )
    # By their own bytes alone the slots would be these; a slot more is too many.
    return made(_most(total, budget, fewest, (budget - minimum) // geometry.bytes_per_token + 1))


def _turn(reserve_tokens: int | None, geometry: Geometry, split: Split) -> Line:
    """Slots for a question and its answer."""
    slots = max(_RESERVE_MIN if reserve_tokens is None else reserve_tokens, split.proxy_tokens)
    if reserve_tokens is None:
        slots = max(slots, min(_RESERVE_MAX, split.slots // _RESERVE_SHARE))
    return slot_line(geometry, "turn", slots, "a question and its answer")


def _shared(split: Split) -> Split:
    """The split when the reserve is known: what is left is shared between memory and headroom."""
    group, behind, tier = split.group_tokens, split.left, split.policy.needs.quantized_tier
    groups = next((g for g in _BLOCK_GROUPS if g * group <= behind // 4), 1)
    block = groups * group
    headroom = max(block, behind // _HEADROOM_SHARE // block * block)  # what is left of a block would never be used
    if split.policy.needs.whole_frames:
        headroom += (behind - headroom) % group
    return replace(
        split,
        headroom_tokens=headroom,
        block_groups=groups,
        chunk=max(_CHUNK_MIN, min(_CHUNK_MAX, split.slots // 32)),
        # Not from the memory, which falls when the headroom grows by a block: what is planned must grow with the slots.
        quantized_tokens=tier.quantized_tokens(behind * (_HEADROOM_SHARE - 1) // _HEADROOM_SHARE) if tier else 0,
    )


def _headroom(geometry: Geometry, split: Split) -> Line:
    frames = split.block_groups * split.frames_per_group
    block = f"blocks of {split.block_groups * split.group_tokens} tokens ({frames} frames)"
    return slot_line(geometry, "headroom", split.headroom_tokens, block)


def _memory(geometry: Geometry, split: Split) -> Line:
    return slot_line(geometry, "memory", split.left, "what a compaction keeps, |C|")


def _first(holds: Callable[[int], bool], start: int) -> int:
    """The first integer >= start for which a monotone condition holds."""
    step = 1
    while not holds(start + step - 1):
        step *= 2
    return bisect_left(range(start + step - 1), True, start, key=holds)


def _most(size: Callable[[int], int], limit: int, low: int, step: int) -> int:
    """The greatest integer whose size, which never falls, keeps to a limit, as that of `low` does and that of `low + step` should not."""
    high, at_low, at_high = low + step, size(low), size(low + step)
    while at_high <= limit:
        low, at_low, high, step = high, at_high, high + 2 * step, 2 * step
        at_high = size(high)
    tries = 0
    while high - low > 1:
        # Sizes grow almost evenly, so a straight line soon meets the limit; where it does not, halving does.
        ahead = (limit - at_low) * (high - low) // (at_high - at_low) if tries < _STRAIGHT_TRIES else (high - low) // 2
        middle, tries = min(max(low + ahead, low + 1), high - 1), tries + 1
        at_middle = size(middle)
        if at_middle > limit:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return low
