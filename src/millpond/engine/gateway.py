"""The family that an engine's sessions run on: everything is the real one's, but what needs the model's time goes by the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millpond.engine.scheduler import Scheduler
from millpond.models.base import Family, Grid, Tokens
from millpond.models.batching import Request
from millpond.models.query_recorder import See
from millpond.positions import Clock

_looking: ContextVar[tuple[See, bool] | None] = ContextVar("millpond_engine_looking", default=None)


class Gateway(Family):
    """A family whose `forward`, `encode` and `logits` hand a request to the scheduler and wait for what comes of it.

    One serves all sessions of an engine, from any thread. What needs no weights but the embedding of text runs where it is called.

    Args:
        family: the real one. scheduler: owns its model.
    """

    def __init__(self, family: Family, scheduler: Scheduler) -> None:
        super().__init__(family.model, family.tokenizer)
        self.behind, self._scheduler = family, scheduler
        self.name, self.model_types, self.any_size = family.name, family.model_types, family.any_size  # type: ignore[misc]
        self.frames_per_group, self.hidden, self.stop_ids = family.frames_per_group, family.hidden, family.stop_ids
        self.geometry, self.rope = family.geometry, family.rope

    @property
    def device(self) -> torch.device:
        return self.behind.device

    def grid(self, height: int, width: int) -> Grid:
        return self.behind.grid(height, width)

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return self.behind.prepare(pixels)

    def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        return self._scheduler.encode(frames, times_us)

    def opening(self, system: str | None = None) -> list[int]:
        return self.behind.opening(system)

    def question(self, text: str, *, after_video: bool) -> Tokens:
        return self.behind.question(text, after_video=after_video)

    def reopening(self) -> list[int]:
        return self.behind.reopening()

    def embed(self, ids: list[int]) -> Tokens:
        return self.behind.embed(ids)

    def assign_positions(self, tokens: Tokens, clock: Clock) -> Tensor:
        return self.behind.assign_positions(tokens, clock)

    def forward(self, tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
        see, before = _looking.get() or (None, False)
        return self._scheduler.forward(Request(tokens, positions, cache, see, before))

    @contextmanager
    def showing_queries(self, see: See, *, before: bool = False) -> Iterator[None]:
        token = _looking.set((see, before))
        try:
            yield
        finally:
            _looking.reset(token)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._scheduler.logits(hidden) if hidden.dim() == 1 else self.behind.logits(hidden)
