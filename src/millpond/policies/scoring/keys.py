"""What unit keys and their mean take in memory; the arithmetic is `millpond.ops.similarity`'s."""

from __future__ import annotations

from millpond.policies.base import Shape


def unit_keys_scratch(shape: Shape) -> int:
    """The most bytes that `ops.distinctiveness` or `mean_unit_key` allocates, beside its result."""
    # float32: a chunk of keys and its unit keys, with norms; the mean key and its parts.
    return 4 * (2 * shape.chunk + 4) * (shape.head_dim + 2)
