"""Qwen2.5-VL: as Qwen2-VL, with a temporal axis in real time."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from millpond.models.qwen2_vl import Qwen2VL
from millpond.positions import Clock


class Qwen25VL(Qwen2VL):
    """Adapter of Qwen2.5-VL (Bai et al., 2025, arXiv 2502.13923).

    The temporal position of a group is `floor(seconds x tokens_per_second)` from the start of its segment, so that frames at any
    rate, and at a changing one, lie where the weights expect them.
    """

    name: ClassVar[str] = "Qwen2.5-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        super().__init__(model, tokenizer, image)
        self.tokens_per_second = float(model.config.vision_config.tokens_per_second)

    def _temporal(self, times_us: np.ndarray, clock: Clock) -> np.ndarray:
        passed = (times_us - clock.start_us).astype(np.float64) * self.tokens_per_second / 1_000_000
        return np.floor(passed).astype(np.int64)
