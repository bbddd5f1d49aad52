"""What the LLaVA adapters share: square frames through a CLIP-like tower, pooled, in a row of 1-D positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from millpond.models.base import Grid, Tokens
from millpond.models.decoder import DecoderFamily
from millpond.models.pixels import CLIP_MEAN, CLIP_STD, by_colour, check_aspect, normalise
from millpond.positions import Clock


class Llava(DecoderFamily):
    """Base of the LLaVA adapters. `image` may hold `image_mean` and `image_std`; sizes come from the tower.

    Attributes:
        side: pixels of the square that the vision tower sees.
        across: vision tokens along it, after pooling.
    """

    frames_per_group = 1
    mean: ClassVar[tuple[float, ...]] = CLIP_MEAN
    std: ClassVar[tuple[float, ...]] = CLIP_STD
    across: int

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        image = image or {}
        self.side = int(model.config.vision_config.image_size)
        self.vision_dtype = next(model.model.vision_tower.parameters()).dtype
        self._mean = by_colour(image, "image_mean", self.mean)
        self._std = by_colour(image, "image_std", self.std)

    def grid(self, height: int, width: int) -> Grid:
        check_aspect(height, width)
        return Grid(self.side, self.side, self.across, self.across, self.across**2)

    def pixels(self, frames: list[np.ndarray]) -> Tensor:
        """Prepared frames -> float32 [1, n, 3, side, side]."""
        return normalise(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), self._mean, self._std)[None]

    def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        return self.encode_several([(frames, times_us)])[0]

    @torch.no_grad()
    def encode_several(self, blocks: Sequence[tuple[list[np.ndarray], list[int]]]) -> list[Tokens]:
        config = self.model.config
        sizes = [len(frames) * self.across**2 for frames, _ in blocks]
        # The pixels' argument has had two names, so it goes by place.
        out = self.model.model.get_video_features(
            self.pixels([frame for frames, _ in blocks for frame in frames]).to(self.device, self.vision_dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        # One video, so one row, of one or two dimensions by version. Some versions end OneVision's features with the newline of
        # the whole video; here it comes with the question.
        embeds = out.pooler_output[0].reshape(-1, self.hidden)[: sum(sizes)].to(self.geometry.dtype)
        several = zip(embeds.split(sizes) if len(sizes) > 1 else [embeds], blocks, strict=True)
        return [self._laid_out(each if len(sizes) == 1 else each.clone(), times_us) for each, (_, times_us) in several]

    def _laid_out(self, embeds: Tensor, times_us: list[int]) -> Tokens:
        grid_position = torch.stack(
            torch.meshgrid(torch.arange(self.across), torch.arange(self.across), indexing="ij"), dim=-1
        )
        return Tokens(
            embeds=embeds,
            grid_position=grid_position.view(-1, 2).repeat(len(times_us), 1).to(torch.int16),
            time_us=torch.tensor(times_us, dtype=torch.long).repeat_interleave(self.across**2),
            visual=torch.ones(len(embeds), dtype=torch.bool),
        )

    def assign_positions(self, tokens: Tokens, clock: Clock) -> Tensor:
        return clock.text(len(tokens))[None]
