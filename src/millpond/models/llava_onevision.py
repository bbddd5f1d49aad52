"""LLaVA-OneVision: frames squeezed into a square, pooled bilinearly by two, one newline at the end of the video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from millpond.models.base import Tokens
from millpond.models.llava import Llava
from millpond.models.pixels import resize


class LlavaOnevision(Llava):
    """Adapter of LLaVA-OneVision (Li et al., 2024, arXiv 2408.03326). Its tower is a SigLIP, and so are its pixels' numbers."""

    name: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        self.across = -(-(self.side // int(model.config.vision_config.patch_size)) // 2)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        self.grid(*pixels.shape[:2])
        return resize(pixels, self.side, self.side)

    @torch.no_grad()
    def question(self, text: str, *, after_video: bool) -> Tokens:
        tokens = super().question(text, after_video=after_video)
        if not after_video:
            return tokens
        newline = self.model.model.image_newline[None].to(tokens.embeds)
        return Tokens.join([replace(self.embed([self.video_id]), embeds=newline), tokens])
