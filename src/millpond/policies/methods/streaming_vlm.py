"""StreamingVLM's layout: a text sink, a text window and a window of the latest vision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import TEXT, Policy, Shape, View, check_whole, keep_top


@dataclass(frozen=True)
class StreamingVLM(Policy):
    """Keep the first and the latest text, and the latest seconds of vision.

    The system keeps its positions contiguous after every eviction. Positions are the session's matter, not a policy's: give
    `Session(positions="contiguous")` to have gaps closed, which here happens when the trained range runs out.

    The published layout has a size of its own; a memory under a cap has another. Where the layout is larger than the memory,
    its three parts shrink alike, by whole tokens, each keeping its end (the sink its start), and the odd token is vision's.
    Where it is smaller, the rest goes to the latest of what lies outside. The pinned prompt is not counted in the sink.

    Attributes:
        text_sink: tokens from the start of the remembered turns. Published: 512.
        text_window: latest text tokens. Published: 512.
        vision_seconds: stream time up to the latest token whose frames stay. Published: 16.
    """

    name: ClassVar[str] = "streaming-vlm"
    source: ClassVar[str] = "Xu et al., StreamingVLM, 2025 (arXiv 2510.09608): notes on the paper and its released code"

    text_sink: int = 512
    text_window: int = 512
    vision_seconds: float = 16.0

    def __post_init__(self) -> None:
        check_whole(self, 0, "text_sink", "text_window")
        if not self.vision_seconds > 0:
            raise PolicyError(f"streaming-vlm: vision_seconds must be above 0, not {self.vision_seconds!r}")

    def keep(self, view: View, slots: int) -> Tensor:
        count = view.tokens
        scores = torch.empty(view.heads, count, device=view.keys.device)
        age = torch.arange(count, dtype=torch.float32, device=view.keys.device)
        for times, grid_position, row in zip(view.time_us, view.grid_position, scores, strict=True):
            text = (grid_position[:, 0] == TEXT).nonzero()[:, 0]
            vision = ((grid_position[:, 0] != TEXT) & (times > times[-1] - self.vision_seconds * 1e6)).nonzero()[:, 0]
            sink = text[: self.text_sink]
            window = text[len(sink) :][max(0, len(text) - len(sink) - self.text_window) :]
            shrink = min(1.0, slots / max(1, len(sink) + len(window) + len(vision)))
            sink, window = sink[: int(shrink * len(sink))], window[len(window) - int(shrink * len(window)) :]
            vision = vision[max(0, len(vision) - (slots - len(sink) - len(window))) :]
            # Whatever is protected comes first; then the sink, the windows, the rest, each from its latest token back.
            row.copy_(age)
            row[window] += count
            row[vision] += count
            row[sink] = 2 * count
        return keep_top(scores, view.protected, slots)

    def scratch(self, shape: Shape) -> int:
        # Ages, marks (three) and two lists of indices.
        marks = shape.of_head(torch.float32, torch.bool, torch.bool, torch.bool, torch.int64, torch.int64)
        return super().scratch(shape) + marks
