"""Qwen2-VL: frames of any size in pairs, M-RoPE with one temporal step a pair. Base of the Qwen adapters.

The rule for a frame's size is that of the published processors with a per-frame limit: a stream has no total length that a
limit on the whole video could refer to. A frame takes at most 768 tokens, which is the most that the reference processing
lets one take (a processor file may say less; those of the checkpoints say 16384, which is meant for still images). To go
beyond, or below, give `max_pixels` and `min_pixels` to `adapt` by themselves: those are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from millpond.errors import ModelError
from millpond.models.base import Grid, Tokens
from millpond.models.decoder import DecoderFamily
from millpond.models.pixels import CLIP_MEAN, CLIP_STD, by_colour, check_aspect, normalise, resize
from millpond.models.transformers_insides import vision_layout
from millpond.positions import Clock

_LAYOUTS = 8
"""Sizes of blocks whose layout is kept: a stream has a few (its block, the waiting group, the last one)."""


class Qwen2VL(DecoderFamily):
    """Adapter of Qwen2-VL (Wang et al., 2024, arXiv 2409.12191).

    `image` may hold `min_pixels` / `max_pixels` (or `size.shortest_edge` / `size.longest_edge`), `image_mean`, `image_std`; the
    defaults are those of the published video processor. In a processor's file (it names its type) the most is capped by
    `frame_tokens`.

    Attributes:
        min_pixels, max_pixels: fewest and most pixels of a frame after resizing.
    """

    name: ClassVar[str] = "Qwen2-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    any_size: ClassVar[bool] = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    frame_tokens: ClassVar[tuple[int, int]] = (128, 768)
    """Fewest and most vision tokens of a frame, by the published video processor."""

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        vision, image = model.config.vision_config, image or {}
        self.patch = int(vision.patch_size)
        self.merge = int(vision.spatial_merge_size)
        self.frames_per_group = int(vision.temporal_patch_size)
        self._layouts: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self.vision_dtype = next(model.model.visual.parameters()).dtype
        self.mean = by_colour(image, "image_mean", self.mean)
        self.std = by_colour(image, "image_std", self.std)
        if not isinstance(image.get("size") or {}, dict):
            raise ModelError(f"the processor's size must name its edges, not be {image['size']!r}")
        self.min_pixels, self.max_pixels = self._limits(image)
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ModelError(f"max_pixels must be at least 1, not {self.max_pixels}")

    def _limits(self, image: dict[str, Any]) -> tuple[int, int]:
        """Fewest and most pixels of a frame."""
        size, unit = image.get("size") or {}, (self.patch * self.merge) ** 2
        minimum, most = (count * unit for count in self.frame_tokens)
        said_least = int(image.get("min_pixels") or size.get("shortest_edge") or minimum)
        said_most = int(image.get("max_pixels") or size.get("longest_edge") or most)
        if not {"image_processor_type", "video_processor_type"}.isdisjoint(image):
            said_most = min(said_most, most)
        return min(said_least, said_most), said_most

    def _rope_axis(self, frequencies: int, text: Any) -> Tensor:
        """M-RoPE in consecutive sections: the first frequencies read time, then height, then width."""
        sections = self._sections(frequencies, text)
        return torch.cat([torch.full((count,), index) for index, count in enumerate(sections)])

    def _sections(self, frequencies: int, text: Any) -> list[int]:
        """How many frequencies read each axis, by the config."""
        sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
        if not isinstance(sections, list) or len(sections) != 3 or sum(sections) != frequencies or min(sections) < 0:
            raise ModelError(
                f"the config's mrope_section {sections!r} does not share {frequencies} frequencies among three axes"
            )
        return sections

    # --- frames -------------------------------------------------------------------------------------------------

    def grid(self, height: int, width: int) -> Grid:
        check_aspect(height, width)
        unit = self.patch * self.merge
        high, wide = self._size(height, width)
        rows, cols = high // unit, wide // unit
        return Grid(high, wide, rows, cols, rows * cols)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Whole units on each edge within the limits, the aspect kept as nearly as they allow (the processors' rule)."""
        unit = self.patch * self.merge
        high, wide = round(height / unit) * unit, round(width / unit) * unit
        if high * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            high = max(unit, math.floor(height / shrink / unit) * unit)
            wide = max(unit, math.floor(width / shrink / unit) * unit)
        elif high * wide < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            high, wide = math.ceil(height * stretch / unit) * unit, math.ceil(width * stretch / unit) * unit
        return high, wide

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        grid = self.grid(*pixels.shape[:2])
        return resize(pixels, grid.height, grid.width)

    def patches(self, frames: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Prepared frames, completed to whole groups -> ([patches, 3 x temporal x patch x patch], grid [1, 3])."""
        span, patch, merge = self.frames_per_group, self.patch, self.merge
        frames = frames + [frames[-1]] * (-len(frames) % span)
        pixels = torch.from_numpy(np.stack(frames))
        count, height, width, colours = pixels.shape
        groups, rows, cols = count // span, height // patch, width // patch
        pixels = pixels.view(groups, span, rows // merge, merge, patch, cols // merge, merge, patch, colours)
        # Patches that merge into one token lie one behind the other. They are put in order while a number is a byte.
        pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(groups * rows * cols, colours, span * patch * patch)
        return normalise(pixels, self.mean, self.std).flatten(1), torch.tensor([[groups, rows, cols]])

    def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        return self.encode_several([(frames, times_us)])[0]

    @torch.no_grad()
    def encode_several(self, blocks: Sequence[tuple[list[np.ndarray], list[int]]]) -> list[Tokens]:
        span, device = self.frames_per_group, self.device
        whole = [frames + [frames[-1]] * (-len(frames) % span) for frames, _ in blocks]
        flat, grid = self.patches([frame for frames in whole for frame in frames])
        shape = tuple(grid[0].tolist())
        grid = grid.to(device)
        layout = self._layouts.get(shape)
        if layout is None:
            layout = vision_layout(self.model.model.visual, grid)
            self._layouts = {**dict(list(self._layouts.items())[1 - _LAYOUTS :]), shape: layout}
        with torch.inference_mode():
            out = self.model.model.visual(flat.to(device, self.vision_dtype), grid_thw=grid, **layout)
        # Frames see only themselves in the tower, so those of several streams can stand behind one another.
        _, high, wide = shape
        rows, cols = high // self.merge, wide // self.merge
        sizes = [len(frames) // span * rows * cols for frames in whole]
        deepstack = [layer.split(sizes) for layer in getattr(out, "deepstack_features", None) or ()]
        several = []
        for index, (embeds, (_, times_us)) in enumerate(zip(out.pooler_output.split(sizes), blocks, strict=True)):
            groups = sizes[index] // (rows * cols)
            grid_position = np.empty((groups, rows, cols, 2), dtype=np.int16)
            grid_position[..., 0], grid_position[..., 1] = np.arange(rows)[:, None], np.arange(cols)
            times = np.array(times_us[::span], dtype=np.int64)
            several.append(
                Tokens(
                    embeds=embeds.to(self.geometry.dtype, copy=True),  # the copies are ordinary tensors
                    grid_position=torch.from_numpy(grid_position.reshape(-1, 2)),
                    time_us=torch.from_numpy(times.repeat(rows * cols)),
                    visual=torch.ones(sizes[index], dtype=torch.bool),
                    deepstack=tuple(layer[index].clone() for layer in deepstack),
                )
            )
        return several

    # --- positions ----------------------------------------------------------------------------------------------

    def assign_positions(self, tokens: Tokens, clock: Clock) -> Tensor:
        # In numpy: for the few numbers of a block, a torch call costs more than what it does.
        if not tokens.visual.numpy().any():
            return clock.text(len(tokens)).expand(3, -1)
        grid_position, times_us = tokens.grid_position.numpy(), tokens.time_us.numpy()
        base = clock.open_segment(int(times_us[0]))
        # A group begins where its grid does; two groups may well carry the same time.
        begins = (grid_position == 0).all(axis=1)
        # Frames shown again stand where they stood; where gaps were closed since, that may lie in front of the segment.
        temporal = np.maximum(clock.origin + self._temporal(times_us[begins], clock), base)
        if len(temporal) > 1:
            clock.step = max(1, int(temporal[-1] - temporal[-2]))
        clock.groups += len(temporal)
        positions = np.empty((3, len(grid_position)), dtype=np.int64)
        positions[0] = temporal[begins.cumsum() - 1]
        positions[1:] = grid_position.T  # widened before the base is added: grid positions have 16 bits
        positions[1:] += base
        clock.next = max(clock.next, int(positions.max()) + 1)
        return torch.from_numpy(positions)

    def _temporal(self, times_us: np.ndarray, clock: Clock) -> np.ndarray:
        """Temporal positions of the next groups, int64, counted from the segment's origin: one a group, whatever the time."""
        return clock.groups + np.arange(len(times_us))
