"""Tokens as the cache stores them: when they are said, and where they lie on a frame's grid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from millpond.models.base import Tokens
from millpond.policies.base import SEPARATOR


def dated(tokens: Tokens, time_us: int) -> Tokens:
    """Text tokens with the stream time at which they are said."""
    return replace(tokens, time_us=torch.full((len(tokens),), time_us, dtype=torch.long))


def grid_positions(tokens: Tokens, *, text: bool) -> Tensor:
    """int16 [n, 2] as the pond stores them: `TEXT` for a turn, `SEPARATOR` for a frame's tokens that lie on no grid."""
    if text or tokens.visual.numpy().all():
        return tokens.grid_position
    return torch.where(tokens.visual[:, None], tokens.grid_position, torch.tensor(SEPARATOR, dtype=torch.int16))
