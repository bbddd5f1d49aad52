"""The newest part of a stream, as far as a compaction has to protect it: frame groups by their time, text by its rank from the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from millpond.policies.base import TEXT

# The newest text of remembered turns is protected up to this share of the memory; older text competes like everything
# else, so that a long conversation cannot crowd out the video.
_TEXT_SHARE = 4


@dataclass(frozen=True)
class Protected:
    """What one compaction must keep.

    Attributes:
        since_us: stream time from which frames are protected. text: how many of the newest text tokens are; None where there is none.
    """

    since_us: int
    text: int | None

    def mask(self, time_us: Tensor, grid_position: Tensor) -> Tensor:
        """Which tokens those are, bool [H, n]: of the times int64 [H, n] and grid positions int16 [H, n, 2] of a layer's tokens."""
        protected = time_us >= self.since_us
        if self.text is not None:
            for head in range(protected.shape[0]):
                said = grid_position[head, :, 0] == TEXT
                # Text is protected by its rank from the end, not by time: a whole turn shares one time.
                after = said.sum() - said.cumsum(0)
                protected[head] &= ~said
                protected[head] |= said & (after < self.text)
        return protected


@dataclass(frozen=True)
class RecentWindow:
    """What could still be protected. Replaced as a whole, so that a block is in or is not.

    Attributes:
        groups: (time_us, tokens) of the latest frame groups, newest last.
        text: newest text tokens that are whole in every head; None while there was no text.
    """

    groups: tuple[tuple[int, int], ...] = ()
    text: int | None = None

    @property
    def group_tokens(self) -> int | None:
        """Tokens of the latest frame group; None before the first."""
        return self.groups[-1][1] if self.groups else None

    def with_block(self, time_us: Tensor, grid_position: Tensor, slots: int) -> RecentWindow:
        """The same behind a block that has run.

        Args:
            time_us: int64 [n]. grid_position: int16 [n, 2]. On the CPU. slots: what the memory could hold.
        """
        recent, text = deque(self.groups), self.text
        shown = grid_position[:, 0] != TEXT
        said = int(len(shown) - shown.sum())
        if said:
            text = (text or 0) + said
            time_us = time_us[shown]
        for time, run in groupby(time_us.tolist()):
            count = len(list(run))
            if recent and recent[-1][0] == time:
                count += recent.pop()[1]
            recent.append((time, count))
        # Groups beyond what the memory could hold can never be protected again.
        held = sum(count for _, count in recent)
        while len(recent) > 1 and held - recent[0][1] >= slots:
            held -= recent.popleft()[1]
        return RecentWindow(tuple(recent), text)

    def without_text(self, count: int) -> RecentWindow:
        """The same without the newest `count` text tokens, which have been taken back."""
        return RecentWindow(self.groups, (self.text or 0) - count)

    def protect(self, tokens: int, slots: int, latest: Callable[[int], int]) -> Protected:
        """What is protected when `slots` of `tokens` tokens are kept.

        Args:
            latest: how many groups at most, of the so many that the memory holds (`Policy.recent`).
        """
        text = min(self.text or 0, slots // _TEXT_SHARE)
        shown = None if self.text is None else text
        if not self.groups:
            return Protected(torch.iinfo(torch.int64).max, shown)
        frames = max(1, tokens // self.groups[-1][1])
        held, since = 0, self.groups[-1][0] + 1
        for time, count in self.groups[: -max(1, latest(frames)) - 1 : -1]:
            if held + count + text > slots:
                break
            held += count
            since = time
        return Protected(since, shown)

    def compacted(self, protected: Protected) -> RecentWindow:
        """The same behind a compaction: what was not protected is no longer whole in every head, and never protected again."""
        # None where there was no text, so that nobody looks for any.
        return RecentWindow(tuple(group for group in self.groups if group[0] >= protected.since_us), protected.text)
