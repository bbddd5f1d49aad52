"""How a budget in bytes is split: prompt, memory, room for the incoming block, reserve for the turn, scratch.

    slots = prompt + memory |C| + room + reserve
    and, where a policy packs what it would forget: packed tokens, and a dequantization buffer on which one layer is unpacked
    bytes = slots x bytes_per_token + frames in waiting + frames for recent frames + scratch + an admission's state
            + a proxy's queries + what a step could have to put back  <=  budget

Arithmetic only; nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.geometry import Geometry
from millpond.policies.base import Policy, Shape
from millpond.policies.scoring.attention import accumulation_scratch
from millpond.policies.scoring.matching import matching_scratch

__all__ = ["Plan", "make_plan"]

# Compaction runs when the room is used up, so a larger room means fewer passes and a smaller memory. An eighth keeps
# selection below half a per cent of ingest at a 7B model's shapes (bench/overhead.py) and memory at 7/8 of what it could be.
_HEADROOM_SHARE = 8
# A turn (question and answer) gets an eighth of the slots, within what real questions and answers need.
_RESERVE_SHARE, _RESERVE_MIN, _RESERVE_MAX = 8, 32, 512
# What a question recalls gets at most half of what lies behind the prompt; the window gets the rest.
_RECALL_SHARE = 2
# Groups that run through the model together: large blocks feed the matrix units, small ones cost less room.
_BLOCK_GROUPS = (4, 2, 1)
_CHUNK_MIN, _CHUNK_MAX = 16, 512


@dataclass(frozen=True)
class Plan:
    """A budget, split.

    Attributes:
        budget: the cap in bytes; None for the uncapped reference, whose storage grows.
        bytes_per_token: keys, values and metadata of one token over all layers.
        slots: token slots allocated (prompt + memory + room + reserve).
        prompt_tokens: pinned at the start, in every layer and head.
        memory_tokens: |C|, what a compaction keeps beside the prompt.
        headroom_tokens: free after a compaction for the frames to come.
        block_tokens, block_groups: what runs through the model at once.
        reserve_tokens: kept free for a question, its answer, what it recalls and what it is shown again.
        group_tokens, frames_per_group: size of one frame group.
        frames_in_full: raw frames that the memory holds when it keeps every one of their tokens.
        waiting_bytes: frames at model resolution that wait for their block to fill.
        scratch_bytes: the most that compaction or re-anchoring takes at any instant.
        chunk: tokens of one head worked on at a time.
        state_bytes: what an admission remembers of the stream.
        query_bytes: a policy's proxy queries.
        undo_bytes: copies of what a block or turn changes in place, until it is in: a proxy text's queries, sums of attention, an admission's
            state.
        quantized_tokens, quantized_bytes: tokens that are remembered in few bits, and their storage, metadata included.
        dequantization_bytes: one layer's keys and values, unpacked.
        retrieved_frames, retrieved_tokens: frame groups that a question recalls from host memory, and their share of the reserve.
        recent_frames, recent_tokens, recent_bytes: latest raw frames, in whole groups, that a question is shown again; their share
            of the reserve; and their pixels at model resolution.
    """

    budget: int | None
    bytes_per_token: int
    slots: int
    prompt_tokens: int
    memory_tokens: int
    headroom_tokens: int
    block_tokens: int
    block_groups: int
    reserve_tokens: int
    group_tokens: int
    frames_per_group: int
    frames_in_full: int
    waiting_bytes: int
    scratch_bytes: int
    chunk: int
    state_bytes: int = 0
    query_bytes: int = 0
    undo_bytes: int = 0
    quantized_tokens: int = 0
    quantized_bytes: int = 0
    dequantization_bytes: int = 0
    retrieved_frames: int = 0
    retrieved_tokens: int = 0
    recent_frames: int = 0
    recent_tokens: int = 0
    recent_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything the plan may hold at once; at most the budget."""
        beside = self.waiting_bytes + self.scratch_bytes + self.state_bytes + self.query_bytes + self.undo_bytes
        beside += self.quantized_bytes + self.dequantization_bytes + self.recent_bytes
        return self.slots * self.bytes_per_token + beside

    @property
    def turn_tokens(self) -> int:
        """What of the reserve is for a question and its answer."""
        return self.reserve_tokens - self.retrieved_tokens - self.recent_tokens

    def seconds_in_full(self, fps: float) -> float:
        """Seconds of video at `fps` that fit into the memory in full detail."""
        return self.frames_in_full / fps

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, for `--json`."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def make_plan(
    budget: int | None,
    geometry: Geometry,
    policy: Policy,
    *,
    prompt_tokens: int,
    group_tokens: int = 1,
    frames_per_group: int = 1,
    frame_bytes: int = 0,
    reserve_tokens: int | None = None,
    state_bytes: int = 0,
    proxy_tokens: int = 0,
    recent_frames: int = 0,
    reopening_tokens: int = 0,
    what: str = "this model",
) -> Plan:
    """Split `budget` bytes for a model and a frame size.

    Args:
        budget: bytes; None only for a policy that ignores the cap.
        prompt_tokens: pinned tokens.
        group_tokens, frames_per_group, frame_bytes: one frame group in tokens and raw frames, one waiting frame in bytes.
        reserve_tokens: slots kept free for a turn; by default an eighth of all, between 32 and 512.
        state_bytes: what an admission remembers of the stream.
        proxy_tokens: length of the text that a policy with the proxy "prompt" is shown; the reserve is never shorter.
        recent_frames: latest raw frames that a question is shown again; rounded up to whole groups.
        reopening_tokens: what stands in front of them behind a remembered turn.
        what: named in errors.

    Raises:
        BudgetError: too small; names the minimum that works.
    """
    needs = policy.needs
    geometry, tier = replace(geometry, accumulated_attention=needs.accumulated_attention), needs.quantized_tier
    proxy_tokens = proxy_tokens if needs.proxy == "prompt" else 0
    query_bytes = (proxy_tokens or needs.queries) * geometry.query_bytes
    reserve_least = max(_RESERVE_MIN if reserve_tokens is None else reserve_tokens, proxy_tokens)
    again = -(-recent_frames // frames_per_group)  # groups
    recent_tokens = again * group_tokens + reopening_tokens if again else 0

    def split(slots: int) -> Plan:
        reserve = reserve_least
        if reserve_tokens is None:
            reserve = max(reserve, min(_RESERVE_MAX, slots // _RESERVE_SHARE))
        reserve += recent_tokens
        retrieved = 0
        if needs.retrieved_frames:
            retrieved = max(
                1, min(needs.retrieved_frames, (slots - prompt_tokens - reserve) // _RECALL_SHARE // group_tokens)
            )
            reserve += retrieved * group_tokens
        behind_prompt = slots - prompt_tokens - reserve
        groups = next((g for g in _BLOCK_GROUPS if g * group_tokens <= behind_prompt // 4), 1)
        block = groups * group_tokens
        headroom = max(
            block, behind_prompt // _HEADROOM_SHARE // block * block
        )  # what is left of a block would never be used
        memory = behind_prompt - headroom
        if needs.whole_frames:
            memory -= memory % group_tokens
            headroom = behind_prompt - memory
        chunk = max(_CHUNK_MIN, min(_CHUNK_MAX, slots // 32))
        # Not from `memory`, which falls when the room grows by a block: what is planned must grow with the slots.
        quantized = tier.quantized_tokens(behind_prompt * (_HEADROOM_SHARE - 1) // _HEADROOM_SHARE) if tier else 0
        largest = int((slots - prompt_tokens) * needs.layer_share) + quantized  # tokens of one layer
        scratch = scratch_bytes(policy, geometry, largest, quantized, group_tokens, chunk, retrieved * group_tokens)
        return Plan(
            budget=budget,
            bytes_per_token=geometry.bytes_per_token,
            slots=slots,
            prompt_tokens=prompt_tokens,
            memory_tokens=memory,
            headroom_tokens=headroom,
            block_tokens=groups * group_tokens,
            block_groups=groups,
            reserve_tokens=reserve,
            group_tokens=group_tokens,
            frames_per_group=frames_per_group,
            frames_in_full=(memory + quantized) // group_tokens * frames_per_group,
            waiting_bytes=groups * frames_per_group * frame_bytes,
            scratch_bytes=scratch,
            chunk=chunk,
            state_bytes=state_bytes,
            query_bytes=query_bytes,
            undo_bytes=proxy_tokens * geometry.query_bytes
            + state_bytes
            + (slots + quantized) * geometry.accumulated_attention_bytes,
            quantized_tokens=quantized,
            quantized_bytes=tier.quantized_bytes(geometry, quantized) if tier else 0,
            dequantization_bytes=tier.dequantization_bytes(geometry, slots + quantized) if tier else 0,
            retrieved_frames=retrieved,
            retrieved_tokens=retrieved * group_tokens,
            recent_frames=again * frames_per_group,
            recent_tokens=recent_tokens,
            recent_bytes=again * frames_per_group * frame_bytes,
        )

    if not policy.capped:
        return split(prompt_tokens + (reserve_tokens or _RESERVE_MAX) + recent_tokens + 8 * group_tokens)
    if budget is None:
        raise BudgetError(f"the policy {policy.name!r} needs a budget; only 'full' runs without one")
    # The minimum that works: one group remembered, one coming in, and room for a turn and one group that it recalls.
    fewest = prompt_tokens + (3 if needs.retrieved_frames else 2) * group_tokens + reserve_least + recent_tokens
    # Tokens are packed by whole groups, so up to a group less one leave beside those that must.
    remembered = policy.minimum_memory(group_tokens) + (tier.quantizer.group - 1 if tier else 0)
    fewest = _first(lambda slots: split(slots).memory_tokens >= remembered, fewest)
    minimum = split(fewest).total_bytes
    if budget < minimum:
        raise BudgetError(
            f"a budget of {format_bytes(budget)} is too small for {what}: the minimum that works is {minimum} bytes "
            f"({format_bytes(minimum)}; {prompt_tokens} prompt tokens, {group_tokens} tokens a frame group, "
            f"{geometry.bytes_per_token} bytes a token)",
            minimum=minimum,
        )
    most = _first(lambda slots: split(slots).total_bytes > budget, fewest + 1) - 1
    return split(most)


def scratch_bytes(
    policy: Policy, geometry: Geometry, tokens: int, quantized: int, block: int, chunk: int, retrieved: int
) -> int:
    """The most that one thing at a time allocates at any instant, in bytes.

    Compacting or re-anchoring `tokens` tokens of a layer, `quantized` of them in few bits, or recalling `retrieved`.
    """
    heads, width, needs = geometry.kv_heads, geometry.head_dim, policy.needs
    # Protection: two masks [H, n] and, while text is counted from the end, one int64 [n] twice; and what every layer keeps, one bit a
    # token, because all choose before one moves.
    protection = 2 * heads * tokens + 16 * tokens + geometry.layers * heads * -(-tokens // 8)
    # Moving: `keep` is counted by the policy; one chunk of one head of one tensor, the check of the selection and its bits.
    moving = chunk * max(geometry.vector_bytes, 8) + heads * tokens + heads * -(-tokens // 4)
    # Re-anchoring: one head's gaps and shifts (int64 [n], five and one an axis), and one chunk's angles (float64 [chunk, D/2],
    # three) and halves (float32, seven), beside what was turned until it is written.
    turning = (40 + 8 * geometry.axes) * tokens + chunk * (3 * 8 + 7 * 4) * width // 2 + chunk * geometry.vector_bytes
    choosing = policy.scratch(Shape(heads, tokens, width, block, chunk))
    if needs.accumulated_attention:
        choosing = max(choosing, accumulation_scratch(width, chunk))
    if needs.deeper_scores:
        # The selection, and one head's tokens looked up in the next layer; all the while what came from one layer and goes to the next.
        choosing = max(choosing, 8 * heads * tokens + matching_scratch(tokens))
        protection += 8 * heads * tokens
        if needs.merging:
            protection += 4 * geometry.layers * heads * tokens  # what every layer left, until it merges
    if tier := needs.quantized_tier:
        coding = tier.quantization_bytes(geometry, chunk)
        choosing = max(choosing, tier.sorting_bytes(tokens)) + coding
        choosing += tier.choosing_bytes(geometry, tokens - quantized, quantized)
        turning += tier.rerotation_bytes(geometry, tokens) + coding
    leaving = retrieving = 0
    if needs.retrieved_frames:
        # One piece of all heads: keys and values as stored and in float32, and its angles and halves, as above.
        piece = max(chunk, heads) * (2 * geometry.vector_bytes + 8 * width + (3 * 8 + 7 * 4) * width // 2)
        # The selection; which tokens leave (int64 [n] twice and a mask), their metadata, and their frames' times and sizes.
        leaving = 8 * heads * tokens + piece + (16 + 1 + 8 + 4 + 4 * geometry.axes + 16) * tokens
        # Scores and numbers of the best frames so far and of one piece, twice; the mean query; masks to find the window.
        retrieving = piece + 40 * (retrieved + chunk) + 16 * geometry.kv_groups * heads * width + 10 * tokens
        protection += 8 * tokens  # what the first layer kept, which the others must keep too
    return max(max(choosing + moving, leaving) + protection, turning, retrieving)


def _first(holds: Callable[[int], bool], start: int) -> int:
    """The least integer >= start for which a monotone condition holds."""
    step = 1
    while not holds(start + step - 1):
        step *= 2
    low, high = start, start + step - 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
