"""Whole frames at equal spacing over everything that was seen."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import Scorer, Shape, View


@dataclass(frozen=True)
class Uniform(Scorer):
    """Keep frames whose times are spread as evenly as possible over the stream so far; the last one may be kept in part.

    Spacing is by stream time, not by slot, so that it stays even after many passes: frames are ranked by halving, the frame
    nearest to the middle of the widest remaining interval first.
    """

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = "the usual baseline: equally spaced frames"

    def score(self, view: View) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, dtype=torch.float32, device=view.keys.device)
        for head in range(view.heads):
            times, frame = view.time_us[head].unique_consecutive(return_inverse=True)
            ranks = torch.tensor(_spread(times.tolist()), dtype=torch.float32, device=scores.device)
            # Within the one frame that is kept in part, the first tokens survive: older slots win ties.
            scores[head] = -ranks.index_select(0, frame)
        return scores

    def scratch(self, shape: Shape) -> int:
        # One head's times and which of them each token has; Python's own numbers are bounded by the ranking.
        return super().scratch(shape) + shape.of_head(torch.int64, torch.int64)


def _spread(times: list[int]) -> list[int]:
    """Rank of each time: newest, oldest, then always the time nearest to the middle of the widest gap left."""
    order = [len(times) - 1] if times else []
    if len(times) > 1:
        order.append(0)
    gaps = [(times[0] - times[-1], 0, len(times) - 1)] if len(times) > 2 else []
    while gaps:
        _, low, high = heapq.heappop(gaps)
        if high - low < 2:
            continue
        middle = (times[low] + times[high]) / 2
        chosen = bisect_left(times, middle, low + 1, high - 1)
        if chosen > low + 1 and middle - times[chosen - 1] <= times[chosen] - middle:
            chosen -= 1
        order.append(chosen)
        for a, b in ((low, chosen), (chosen, high)):
            heapq.heappush(gaps, (times[a] - times[b], a, b))
    ranks = [0] * len(times)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks
