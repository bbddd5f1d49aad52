"""Recent frames: their pixels are kept after they have run, in the groups in which they ran, and a question is shown them in full."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Shot = tuple[int, np.ndarray]
"""A frame at model resolution, uint8 [height, width, 3], and its stream time in microseconds."""
Groups = tuple[tuple[Shot, ...], ...]


def with_block(groups: Groups, block: Sequence[Shot], size: int, most: int) -> Groups:
    """The latest `most` groups when a block of frames has run, in groups of `size`."""
    groups = *groups, *(tuple(block[first : first + size]) for first in range(0, len(block), size))
    return groups[max(0, len(groups) - most) :]


def blocks_of(groups: Groups, count: int, size: int, block_groups: int) -> list[list[Shot]]:
    """The latest `count` groups as blocks to encode, oldest first.

    A block holds frames of one size, no more than run at once while watching (`block_groups`), in the groups in which they ran: one
    that was cut short, by a change of size or by a turn, ends its block.
    """
    blocks: list[list[Shot]] = []
    for group in groups[max(0, len(groups) - count) :]:
        last = blocks[-1] if blocks else []
        whole, alike = len(last) % size == 0, last and last[0][1].shape == group[0][1].shape
        if alike and whole and len(last) < block_groups * size:
            last.extend(group)
        else:
            blocks.append(list(group))
    return blocks
