"""What a compaction brings to host memory, worked out before any of it is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ring:
    """Which frames and tokens a host cache holds. Replaced as a whole.

    Attributes:
        first, end: frames held are numbered `first`, ..., `end` - 1, by their order in the stream.
        next: tokens that ever came in: the next one's slot, before the ring's modulo.
        forgotten: frames that left because it was full. bytes_in: moved from the device.
    """

    first: int = 0
    end: int = 0
    next: int = 0
    forgotten: int = 0
    bytes_in: int = 0


@dataclass(frozen=True, eq=False)
class Arrival:
    """Tokens of one frame that a pass brings.

    Attributes:
        row: of the frame. slot: of its first new token, before the ring's modulo.
        first, count: which of the leaving tokens they are.
        line: int64 [3], the frame's line in the table afterwards.
        new: whether no part of the frame came before.
    """

    row: int
    slot: int
    first: int
    count: int
    line: Tensor
    new: bool


@dataclass(frozen=True)
class Arrivals:
    """What a pass brings, and where it goes: worked out by `HostCache.arrange`, written by `register` and `offloading`.

    Attributes:
        ring: the host cache's afterwards. frames: in stream order.
    """

    ring: Ring
    frames: tuple[Arrival, ...]
