"""Two clocks: storage slots (the cache counts those) and stream positions (counted here).

The session owns a `Clock`; nothing reads `rope_deltas`, which lives on the model and would be shared by every session
on it. `Rope` rerotates stored keys from old positions to new ones, so that a stream can run past the trained range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millpond import ops


@dataclass
class Clock:
    """Where the next token of the stream stands on the rotary axes.

    Text takes `next`, `next + 1`, ... on every axis. A video segment fixes `base` for its height and width axes and
    counts time on from `origin`, the temporal position of the instant `start_us`. After a segment, text goes on at
    maximum + 1, as the weights were trained.

    Attributes:
        next: one past the largest position in use on any axis.
        base: spatial base of the open video segment; None while no segment is open.
        origin: temporal position of `start_us`.
        start_us: stream time at which the open segment began, in microseconds.
        groups: temporal groups placed in the open segment so far.
        step: positions between the last two temporal groups, at least 1.
    """

    next: int = 0
    base: int | None = None
    origin: int = 0
    start_us: int = 0
    groups: int = 0
    step: int = 1

    def text(self, count: int) -> Tensor:
        """Positions of `count` text tokens, int64 [count], equal on every axis; closes an open video segment."""
        self.base = None
        first = self.next
        self.next += count
        return torch.arange(first, self.next)

    def open_segment(self, start_us: int) -> int:
        """Open a video segment at `next` unless one is open; return its spatial base."""
        if self.base is None:
            self.base = self.origin = self.next
            self.start_us, self.groups = start_us, 0
        return self.base

    def shift(self, spatial: int, temporal: int) -> None:
        """Move the clock back after a re-anchoring: `spatial` for the segment's base, `temporal` for everything later."""
        self.next -= temporal
        self.origin -= temporal
        if self.base is not None:
            self.base -= spatial


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotary embedding of one model, enough to move stored keys along it.

    Attributes:
        inv_freq: float32 [D/2] inverse frequencies (RoFormer, eq. 15).
        axis: int64 [D/2], the position axis that each frequency reads (all 0 for 1-D RoPE; M-RoPE's sections otherwise).
        limit: positions that the weights were trained on (`max_position_embeddings`).

    The layout is the "rotate half" one of the Llama and Qwen families: frequency i rotates components i and i + D/2.
    Fewer frequencies than D/2 (partial rotary) leave the remaining components as they are.
    """

    inv_freq: Tensor
    axis: Tensor
    limit: int

    def rotate_(self, keys: Tensor, delta: Tensor) -> None:
        """Rotate keys in place by `delta` positions; in float32, stored back in the keys' dtype.

        Compiled where that is possible, and then without scratch.

        Args:
            keys: [..., n, D], already roped at some position p.
            delta: int64 [..., n, axes], broadcastable to the keys; the keys end up roped at p + delta.
        """
        ops.rerotate(keys, delta, self.axis, self.inv_freq)
