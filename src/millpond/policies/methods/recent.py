"""Sink and window: the first tokens and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import Policy, View, check_whole, keep_top


@dataclass(frozen=True)
class Recent(Policy):
    """Keep the first `sink` tokens behind the prompt and the latest of all others.

    Attributes:
        sink: attention sinks kept from the start of the stream. Published: 4; the pinned prompt holds more of them.
    """

    name: ClassVar[str] = "recent"
    source: ClassVar[str] = "Xiao et al., StreamingLLM, ICLR 2024 (arXiv 2309.17453)"

    sink: int = 4

    def __post_init__(self) -> None:
        check_whole(self, 0, "sink")

    def keep(self, view: View, slots: int) -> Tensor:
        age = torch.arange(view.tokens, dtype=torch.float32, device=view.keys.device)
        free = slots - int(view.protected[0].sum())
        age[: min(self.sink, free)] = view.tokens
        return keep_top(age.repeat(view.heads, 1), view.protected, slots)
