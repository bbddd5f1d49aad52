"""LLaVA-NeXT-Video: the middle square of each frame, pooled by the model's own resampler."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from millpond.models.llava import Llava
from millpond.models.pixels import centre_crop, resize


class LlavaNextVideo(Llava):
    """Adapter of LLaVA-NeXT-Video (Zhang et al., 2024): the shorter side is resized to the tower's, the middle is cut out."""

    name: ClassVar[str] = "LLaVA-NeXT-Video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        self.across = self.side // int(model.config.vision_config.patch_size) // int(model.config.spatial_pool_stride)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        self.grid(height, width)
        short = min(height, width)
        size = [int(self.side * edge / short) if edge != short else self.side for edge in (height, width)]
        return centre_crop(resize(pixels, size[0], size[1]), self.side, self.side)
