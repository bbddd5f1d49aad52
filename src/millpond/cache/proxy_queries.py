"""Queries beside the cache: those of a policy's proxy, kept for the next compaction, and the attention that they pay, accumulated.

Whose queries come here is decided by `millpond.stream.runner`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millpond import ops
from millpond.cache.storage.layer import PondLayer, rerotation
from millpond.memory.geometry import Geometry
from millpond.memory.resumable import Step
from millpond.positions import Rope


@dataclass(frozen=True, eq=False)
class QueriesState:
    """What was noted: `rows` and `counts` of `ProxyQueries`, the rows a view of its storage."""

    rows: Tensor
    counts: tuple[int, ...]


class ProxyQueries:
    """The queries of at most `size` tokens in every layer, in storage that is allocated once.

    Attributes:
        rows: [layers, H * g * size * D], of which each layer uses as much as it has queries.
        counts: tokens noted, per layer.
    """

    def __init__(self, geometry: Geometry, size: int, device: torch.device) -> None:
        self._geometry, self._size = geometry, size
        columns = geometry.kv_heads * geometry.kv_groups * size * geometry.head_dim
        self.rows = torch.zeros(geometry.layers, columns, dtype=geometry.dtype, device=device)
        self.counts = [0] * geometry.layers

    def layer(self, index: int) -> Tensor:
        """One layer's queries, [H, g, w, D], a view of the storage; w is 0 before anything was noted."""
        shape = self._geometry.kv_heads, self._geometry.kv_groups, self.counts[index], self._geometry.head_dim
        return self.rows[index, : torch.Size(shape).numel()].view(shape)

    def note(self, index: int, queries: Tensor, positions: Tensor, rope: Rope) -> None:
        """Keep a layer's queries of the last tokens of a block; those of the block before are forgotten.

        Args:
            queries: [n, H * g, D], without their rotation. positions: int64 [axes, n].
        """
        latest = queries[-self._size :]
        self.counts[index] = latest.shape[0]
        kept = self.layer(index)
        kept.copy_(latest.transpose(0, 1).view_as(kept))
        rope.rotate_(kept, positions[:, -latest.shape[0] :].T)

    def forget(self, count: int) -> None:
        """Forget the latest `count` tokens of the block that was noted last."""
        for index, noted in enumerate(self.counts):
            left = self.layer(index)[:, :, : max(0, noted - count)].clone()
            self.counts[index] = left.shape[2]
            self.layer(index).copy_(left)

    def rerotation(self, rope: Rope, by: Tensor, chunk: int) -> list[Step]:
        """The steps that rerotate all queries by `by` positions, int64 [axes], `chunk` at a time. See `Steps`."""
        every = [self.layer(index).view(-1, self._geometry.head_dim) for index in range(len(self.counts))]
        return [rerotation(rows, rope, by.expand(len(rows), -1), chunk) for rows in every]

    def state(self) -> QueriesState:
        """What is noted now."""
        return QueriesState(self.rows, tuple(self.counts))

    def restore(self, state: QueriesState) -> None:
        """Copy what the `state` of queries of the same size says."""
        self.rows.copy_(state.rows)
        self.counts = list(state.counts)


def accumulate_attention(layer: PondLayer, group: int, queries: Tensor, at: Tensor, rope: Rope, chunk: int) -> None:
    """Add to each live token's sum the attention that the block just run pays it; called behind the layer's attention.

    The rows of the softmax are built anew from the block's queries, a piece at a time.

    Args:
        group: query heads that share a KV head. chunk: rows of a head at a time.
        queries: [n, H * g, D] of the last n live tokens, without their rotation. at: their positions, int64 [axes, n].
    """
    count, at_once = queries.shape[0], max(1, chunk // group)
    keys, attention = layer.attended()
    before = keys.shape[1] - count
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        own = torch.arange(before + first, before + last, device=keys.device)
        for head in range(keys.shape[0]):
            piece = queries[first:last, head * group : (head + 1) * group].transpose(0, 1).to(torch.float32, copy=True)
            rope.rotate_(piece, at[:, first:last].T)
            rows = piece.reshape(-1, piece.shape[2])
            ops.add_attention(rows, keys[head, :0], keys[head], attention[head], chunk, own.repeat(group))
    layer.write_back(attention)
