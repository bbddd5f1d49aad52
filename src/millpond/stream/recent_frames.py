"""Recent frames: their pixels are kept after they have run, and a question is shown them in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from millpond.stream.runner import Runner

__all__ = ["RecentFrames", "Shot"]

Shot = tuple[int, np.ndarray]
"""A frame at model resolution, uint8 [height, width, 3], and its stream time in microseconds."""


class RecentFrames:
    """The pixels of the latest frames that have run through the model, in the groups in which they ran.

    Args:
        runner: says how many (`recent_frames`, rounded up to whole groups).

    Attributes:
        groups: replaced as a whole, never changed, so that who keeps it can put it back.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._most = -(-runner.recent_frames // runner.family.frames_per_group)
        self.groups: tuple[tuple[Shot, ...], ...] = ()

    def keep(self, block: Sequence[Shot]) -> None:
        """Take over the frames of a block that has run; the oldest ones go."""
        size = self._runner.family.frames_per_group
        groups = *self.groups, *(tuple(block[first : first + size]) for first in range(0, len(block), size))
        self.groups = groups[max(0, len(groups) - self._most) :]

    def clear(self) -> None:
        """Forget all of them."""
        self.groups = ()

    def blocks(self, waiting: int) -> list[list[Shot]]:
        """What a question is shown when `waiting` of the latest frames have not run: blocks to encode, oldest first.

        A block holds frames of one size, no more than run at once while watching, in the groups in which they ran: one that was cut
        short, by a change of size or by a turn, ends its block.
        """
        size, most = self._runner.family.frames_per_group, self._runner.pond.plan.block_groups
        count = -(-max(0, self._runner.recent_frames - waiting) // size)
        blocks: list[list[Shot]] = []
        for group in self.groups[max(0, len(self.groups) - count) :]:
            last = blocks[-1] if blocks else []
            whole, alike = len(last) % size == 0, last and last[0][1].shape == group[0][1].shape
            if alike and whole and len(last) < most * size:
                last.extend(group)
            else:
                blocks.append(list(group))
        return blocks
