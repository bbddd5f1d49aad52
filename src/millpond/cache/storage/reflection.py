"""Rows exchanged with those at the other end, so that two runs of tokens take turns in one place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from millpond.memory.resumable import Pieces, Step


def reflection(tensors: Sequence[Tensor], count: int, scratch: int) -> list[Step]:
    """The steps that exchange row i with row n - 1 - i, in every tensor and head, for i < `count`. See `Steps`.

    Done twice, everything is where it was.

    Args:
        tensors: [H, n, ...]. count: at most n / 2. scratch: bytes that may be worked on at once; at least two rows of one head.
    """
    return [partial(_exchange, tensor, count, scratch, Pieces()) for tensor in tensors]


def _exchange(tensor: Tensor, count: int, scratch: int, progress: Pieces) -> None:
    heads, rows = tensor.shape[:2]
    row = tensor[0, 0].numel() * tensor.itemsize
    heads_at_once = max(1, min(heads, scratch // (2 * row)))
    at_once = max(1, scratch // (2 * row * heads_at_once))
    pieces = [
        (slice(head, head + heads_at_once), first, min(first + at_once, count))
        for head in range(0, heads, heads_at_once)
        for first in range(0, count, at_once)
    ]

    def make(index: int) -> tuple[Tensor, Tensor]:
        head, first, last = pieces[index]
        return tensor[head, rows - last : rows - first].flip(1), tensor[head, first:last].flip(1)

    def write(index: int, front: Tensor, back: Tensor) -> None:
        head, first, last = pieces[index]
        tensor[head, first:last] = front
        tensor[head, rows - last : rows - first] = back

    progress.run(len(pieces), make, write)
