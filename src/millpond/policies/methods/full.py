"""Everything: the reference without a cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Policy, View


@dataclass(frozen=True)
class Full(Policy):
    """Keep every token; the cache grows without bound. What the others are measured against."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "the model as it was trained"
    capped: ClassVar[bool] = False

    def keep(self, view: View, slots: int) -> Tensor:
        raise PolicyError("the policy 'full' keeps everything and cannot choose")
