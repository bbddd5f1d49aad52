"""What a stream takes of the budget beside its cache: frames that it holds at model resolution."""

from __future__ import annotations

from dataclasses import dataclass

from millpond.cache.plan import Split
from millpond.memory.geometry import Geometry
from millpond.memory.lines import Line, slot_line


@dataclass(frozen=True)
class FramesAsPixels:
    """What frames take of the budget that are held at model resolution: those that wait for their block, and the recent ones.

    Attributes:
        frame_bytes: of one frame; 0 where no frame has been seen.
        recent: how many of the latest a question sees as recent frames; rounded up to whole groups.
        reopening_tokens: what stands in front of them behind a remembered turn.
    """

    frame_bytes: int
    recent: int
    reopening_tokens: int

    def _groups(self, split: Split) -> int:
        return -(-self.recent // split.frames_per_group)

    def slots(self, geometry: Geometry, split: Split) -> Line:
        """Where the latest frames run again."""
        groups = self._groups(split)
        tokens = groups * split.group_tokens + self.reopening_tokens if groups else 0
        purpose = f"{groups * split.frames_per_group} recent frames again, behind the memory"
        return slot_line(geometry, "recent frames", tokens, purpose)

    def pixels(self, geometry: Geometry, split: Split) -> Line:
        """Those frames' pixels."""
        frames = self._groups(split) * split.frames_per_group
        purpose = f"the latest {frames}, to be encoded again"
        return Line("recent pixels", 0, frames * self.frame_bytes, purpose)

    def waiting(self, geometry: Geometry, split: Split) -> Line:
        """Frames whose block is not full."""
        frames = split.block_groups * split.frames_per_group
        purpose = f"{frames} frames, until their block is full"
        return Line("waiting frames", 0, frames * self.frame_bytes, purpose)
