"""Qwen3-VL: every group of frames in its own vision tags behind a timestamp in text; DeepStack features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from millpond.errors import ModelError
from millpond.models.base import Grid, Tokens
from millpond.models.qwen2_vl import Qwen2VL
from millpond.positions import Clock

_LONGEST_STAMP = "<9999999.9 seconds>"


class Qwen3VL(Qwen2VL):
    """Adapter of Qwen3-VL (Bai et al., 2025, arXiv 2511.21631).

    A group of frames is `<seconds>`, vision start, its tokens, vision end; the time is the middle between its first and last
    frame. M-RoPE is interleaved and knows no time: a group's tokens share one temporal position, and the text after them goes
    on at maximum + 1.

    The vision tags that the chat template puts around the whole video give way to the groups' own, as in the processor that
    came out with the weights (transformers 4.57). Since 5.10 transformers leaves the outer pair standing as well.

    `size` in a video processor's file limits the whole video; a frame's share of it depends on a length that a stream does not
    have. The cap of 768 tokens a frame holds instead, and the minimum is what a video of one group would need.
    """

    name: ClassVar[str] = "Qwen3-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    frame_tokens: ClassVar[tuple[int, int]] = (2, 768)

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        self._start, self._end = int(model.config.vision_start_token_id), int(model.config.vision_end_token_id)
        self._stamp_most = len(self.chat.text_ids(_LONGEST_STAMP))
        before, after = super().opening(), self.chat.after_video("x")
        if before[-1:] != [self._start] or after[:1] != [self._end]:
            raise ModelError("the chat template does not put Qwen3-VL's vision tags around the video")

    def _limits(self, image: dict[str, Any]) -> tuple[int, int]:
        size = image.get("size") or {}
        if "video_processor_type" in image and size:
            most = max(size["longest_edge"], size["shortest_edge"]) // self.frames_per_group
            image = {
                **image,
                "size": {"shortest_edge": size["shortest_edge"] // self.frames_per_group, "longest_edge": most},
            }
        return super()._limits(image)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        unit = self.patch * self.merge
        if min(height, width) < unit:
            scale = unit / min(height, width)
            height, width = int(height * scale), int(width * scale)
        return super()._size(height, width)

    def _rope_axis(self, frequencies: int, text: Any) -> Tensor:
        """Interleaved M-RoPE: frequencies take turns t, h, w while the sections last; the rest read time."""
        axis = torch.zeros(frequencies, dtype=torch.long)
        sections = self._sections(frequencies, text)
        for which in (1, 2):
            axis[which : 3 * sections[which] : 3] = which
        return axis

    def grid(self, height: int, width: int) -> Grid:
        grid = super().grid(height, width)
        return replace(grid, tokens=grid.tokens + self._stamp_most + 2)

    def opening(self, system: str | None = None) -> list[int]:
        return super().opening(system)[:-1]  # the tags belong to each group of frames

    def question(self, text: str, *, after_video: bool) -> Tokens:
        return self.embed(self.chat.after_video(text)[1:] if after_video else self.chat.next_turn(text))

    def reopening(self) -> list[int]:
        return super().reopening()[:-1]

    def encode_several(self, blocks: Sequence[tuple[list[np.ndarray], list[int]]]) -> list[Tokens]:
        seen = super().encode_several(blocks)
        return [self._tagged(each, times_us) for each, (_, times_us) in zip(seen, blocks, strict=True)]

    def _tagged(self, seen: Tokens, times_us: list[int]) -> Tokens:
        """Every group of frames behind its timestamp and between its tags."""
        span = self.frames_per_group
        groups = -(-len(times_us) // span)
        size = len(seen) // groups
        parts: list[Tokens] = []
        for group in range(groups):
            # A group that was completed by repeating its last frame has that frame's time twice.
            last = min(group * span + span, len(times_us)) - 1
            middle = (times_us[group * span] + times_us[last]) / 2e6
            tagged = [*self.chat.text_ids(f"<{middle:.1f} seconds>"), self._start]
            picture = slice(group * size, group * size + size)
            for part in (
                self.embed(tagged),
                Tokens(seen.embeds[picture], seen.grid_position[picture], seen.time_us[picture], seen.visual[picture]),
                self.embed([self._end]),
            ):
                parts.append(replace(part, time_us=torch.full((len(part),), times_us[group * span], dtype=torch.long)))
        return replace(Tokens.join(parts), deepstack=seen.deepstack)

    def assign_positions(self, tokens: Tokens, clock: Clock) -> Tensor:
        pieces: list[Tensor] = []
        _, counts = tokens.visual.unique_consecutive(return_counts=True)
        first = 0
        for count in counts.tolist():
            if not tokens.visual[first]:
                pieces.append(clock.text(count).expand(3, -1))
            else:
                spatial = tokens.grid_position[first : first + count].to(torch.long).T + clock.next
                positions = torch.cat([torch.full((1, count), clock.next), spatial])
                clock.next = int(positions.max()) + 1
                pieces.append(positions)
            first += count
        return torch.cat(pieces, dim=1)

    def _beside(self, tokens: Tokens) -> dict[str, Any]:
        if not tokens.deepstack:
            return {}
        visual = tokens.visual[None].to(self.device)
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(tokens.deepstack)}
