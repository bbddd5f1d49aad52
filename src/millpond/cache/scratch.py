"""What a cache works on for an instant, operation by operation, counted from above: the line that is called scratch.

One operation runs at a time, so the line is the largest of them. Every number here is held against the allocator by the tests. Sizes are
in bytes; `tokens` are those of one layer, `quantized` of them in few bits.
"""

from __future__ import annotations

from millpond.cache.plan import Split
from millpond.memory.geometry import Geometry
from millpond.memory.lines import Line
from millpond.policies.base import Policy, Shape
from millpond.policies.scoring.attention import accumulation_scratch
from millpond.policies.scoring.matching import matching_scratch


def scratch_line(geometry: Geometry, split: Split) -> Line:
    """The most that compacting, re-anchoring or retrieving allocates at any instant."""
    policy = split.policy
    # Of the largest layer.
    tokens = int((split.slots - split.prompt_tokens) * policy.needs.layer_share) + split.quantized_tokens
    compacting = _choosing(policy, geometry, tokens, split) + _moving(geometry, tokens, split.chunk)
    if policy.needs.retrieved_frames:
        compacting = max(compacting, _offloading(geometry, tokens, split.chunk))
    compacting += _selection(policy, geometry, tokens)
    most = max(compacting, _rerotating(policy, geometry, tokens, split.chunk), _retrieving(geometry, tokens, split))
    return Line("scratch", 0, most, "compaction and re-anchoring")


def _selection(policy: Policy, geometry: Geometry, tokens: int) -> int:
    """What stays from the first layer's choice to the last layer's move (`compaction.py`)."""
    heads = geometry.kv_heads
    # Two masks [H, n] and, while text is counted from the end, one int64 [n] twice; and what every layer keeps, one bit a
    # token, because all choose before one moves.
    held = 2 * heads * tokens + 16 * tokens + geometry.layers * heads * -(-tokens // 8)
    if policy.needs.deeper_scores:
        held += 8 * heads * tokens  # what came from one layer and goes to the next
        if policy.needs.merging:
            held += 4 * geometry.layers * heads * tokens  # what every layer left, until it merges
    if policy.needs.retrieved_frames:
        held += 8 * tokens  # what the first layer kept, which the others must keep too
    return held


def _choosing(policy: Policy, geometry: Geometry, tokens: int, split: Split) -> int:
    """A policy's choice in one layer, and its merging there."""
    heads, chunk = geometry.kv_heads, split.chunk
    choosing = policy.scratch(Shape(heads, tokens, geometry.head_dim, split.group_tokens, chunk))
    if policy.needs.deeper_scores:
        # The selection, and one head's tokens looked up in the next layer.
        choosing = max(choosing, 8 * heads * tokens + matching_scratch(tokens))
    if policy.needs.accumulated_attention:
        choosing = max(choosing, accumulation_scratch(geometry.head_dim, chunk))
    if tier := policy.needs.quantized_tier:
        choosing = max(choosing, tier.sorting_bytes(tokens)) + tier.quantization_bytes(geometry, chunk)
        choosing += tier.choosing_bytes(geometry, tokens - split.quantized_tokens, split.quantized_tokens)
    return choosing


def _moving(geometry: Geometry, tokens: int, chunk: int) -> int:
    """Survivors on their way down (`layer.py`)."""
    # What stays is counted by the policy; one chunk of one head of one tensor, the check of the selection and its bits.
    heads = geometry.kv_heads
    return chunk * max(geometry.vector_bytes, 8) + heads * tokens + heads * -(-tokens // 4)


def _rerotating(policy: Policy, geometry: Geometry, tokens: int, chunk: int) -> int:
    """Stored keys rerotated to new positions (`rerotation.py`)."""
    # One head's gaps and shifts (int64 [n], five and one an axis), and one chunk's rotation beside what it gave until that is written.
    bytes_ = (40 + 8 * geometry.axes) * tokens + _rotation(geometry, chunk) + chunk * geometry.vector_bytes
    if tier := policy.needs.quantized_tier:
        bytes_ += tier.rerotation_bytes(geometry, tokens) + tier.quantization_bytes(geometry, chunk)
    return bytes_


def _rotation(geometry: Geometry, rows: int) -> int:
    """Angles (float64 [rows, D/2], three) and halves (float32, seven) of rows that are rotated at once."""
    return rows * (3 * 8 + 7 * 4) * geometry.head_dim // 2


def _piece(geometry: Geometry, chunk: int) -> int:
    """One piece of all heads on its way to host memory or back: keys and values as stored and in float32, and its rotation."""
    rows = max(chunk, geometry.kv_heads)
    return rows * (2 * geometry.vector_bytes + 8 * geometry.head_dim) + _rotation(geometry, rows)


def _offloading(geometry: Geometry, tokens: int, chunk: int) -> int:
    """What a compaction sends to host memory (`host.py`)."""
    # The selection; which tokens leave (int64 [n] twice and a mask), their metadata, and their frames' times and sizes.
    leaving = (16 + 1 + 8 + 4 + 4 * geometry.axes + 16) * tokens
    return 8 * geometry.kv_heads * tokens + _piece(geometry, chunk) + leaving


def _retrieving(geometry: Geometry, tokens: int, split: Split) -> int:
    """What a question brings back from there (`retrieval.py`)."""
    if not split.policy.needs.retrieved_frames:
        return 0
    # Scores and numbers of the best frames so far and of one piece, twice; the mean query; masks to find the window.
    best = 40 * (split.claimed("retrieved frames") + split.chunk)
    query = 16 * geometry.kv_groups * geometry.kv_heads * geometry.head_dim
    return _piece(geometry, split.chunk) + best + query + 10 * tokens
