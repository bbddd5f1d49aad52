"""What a cache takes of the budget, a line for each consumer, and the plan that is made of them.

A further consumer is a function that gives its line, entered in `RESERVE` when it takes slots, and in `BESIDE` when it takes bytes alone.
What belongs to a stream, not to its cache, is handed to `make_plan` in the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millpond.cache.plan import Consumer, Plan, Split, split_budget
from millpond.cache.scratch import scratch_line
from millpond.memory.geometry import Geometry
from millpond.memory.lines import STORAGE, Line, slot_line
from millpond.policies.base import Policy

# What a question retrieves gets at most half of what lies behind the prompt; the window gets the rest.
_RETRIEVED_SHARE = 2


def retrieved_frames(geometry: Geometry, split: Split) -> Line:
    """Slots for what a question retrieves from host memory; see `millpond.cache.retrieval`."""
    groups = 0
    if split.policy.needs.retrieved_frames:
        groups = max(1, min(split.policy.needs.retrieved_frames, split.left // _RETRIEVED_SHARE // split.group_tokens))
    frames = groups * split.frames_per_group
    purpose = f"{frames} frames that a question brings back from host memory"
    return slot_line(geometry, "retrieved frames", groups * split.group_tokens, purpose)


def quantized_store(geometry: Geometry, split: Split) -> Line:
    """Tokens that are remembered in few bits, metadata included; see `millpond.cache.storage.quantized_store`."""
    tier = split.policy.needs.quantized_tier
    size = tier.quantized_bytes(geometry, split.quantized_tokens) if tier else 0
    return Line("quantized store", 0, size, f"{split.quantized_tokens} tokens remembered in few bits", STORAGE)


def dequantization_buffer(geometry: Geometry, split: Split) -> Line:
    """One layer's keys and values, dequantized; see `millpond.kv_quantization.tier`."""
    tier = split.policy.needs.quantized_tier
    size = tier.dequantization_bytes(geometry, split.slots + split.quantized_tokens) if tier else 0
    return Line("dequantization buffer", 0, size, "where one layer is dequantized")


def queries(geometry: Geometry, split: Split) -> Line:
    """The queries of a policy's proxy; see `millpond.cache.proxy_queries`."""
    tokens = split.proxy_tokens or split.policy.needs.queries
    return Line("queries", 0, tokens * geometry.query_bytes, "the policy's proxy")


def undo(geometry: Geometry, split: Split) -> Line:
    """Copies of what a block or turn changes in place, until it is in: a proxy text's queries and accumulated attention."""
    attention = (split.slots + split.quantized_tokens) * geometry.accumulated_attention_bytes
    size = split.proxy_tokens * geometry.query_bytes + attention
    return Line("undo", 0, size, "what a block could have to put back")


RESERVE: tuple[Consumer, ...] = (retrieved_frames,)
"""Consumers of slots that are kept free for what runs behind the memory; in this order, behind a turn's and a stream's own."""
BESIDE: tuple[Consumer, ...] = (quantized_store, dequantization_buffer, scratch_line, queries, undo)
"""Consumers of bytes alone."""


def make_plan(
    budget: int | None,
    geometry: Geometry,
    policy: Policy,
    *,
    reserve: Sequence[Consumer] = (),
    beside: Sequence[Consumer] = (),
    **sizes: Any,
) -> Plan:
    """Split `budget` bytes for a cache, and for what a stream holds besides.

    Args:
        reserve, beside: the stream's consumers, of slots and of bytes alone.
        budget, geometry, policy, sizes: as in `millpond.cache.plan.split_budget`.

    Raises:
        BudgetError: too small; names the minimum that works.
    """
    reserve, beside = (*reserve, *RESERVE), (*BESIDE, *beside)
    return split_budget(budget, geometry, policy, reserve=reserve, beside=beside, **sizes)
