"""What a stream goes on with, and where a step of it began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millpond.cache.pond import Mark, PondState
from millpond.models.base import Grid
from millpond.positions import Clock


@dataclass(frozen=True, eq=False)
class RunnerState:
    """Everything that a stream goes on with, beside the settings with which it began and the frames that wait in front of it.

    Attributes:
        budget: bytes; None without a cap. grid: the largest frame size planned for.
        clock, tokens, reanchorings, seconds: as in `Runner`.
        admission: what the admission remembers of the stream.
        pond: the memory. Its tensors are views of the pond that gave it.
    """

    budget: int | None
    grid: Grid | None
    clock: Clock
    tokens: int
    reanchorings: int
    seconds: Mapping[str, float]
    admission: Any
    pond: PondState


@dataclass(frozen=True, eq=False)
class RunnerMark:
    """Where a step of a stream began. The attributes are those of `RunnerState`."""

    clock: Clock
    tokens: int
    admission: Any
    pond: Mark
