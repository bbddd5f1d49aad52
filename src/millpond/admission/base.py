"""The contract of an admission: how much of each frame group goes to the decoder.

An admission stands before any policy: what it turns away never takes a slot, and never costs a forward of the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from millpond.cache.plan import Consumer, Split
from millpond.memory.geometry import Geometry
from millpond.memory.lines import Line

Verdict = Literal["clear", "reduced", "drop"]
"""All of a group's tokens, half of them (every second one of each row and column), or none."""


@dataclass(frozen=True)
class Admission(ABC):
    """Base of all admissions: a frozen dataclass whose fields are the method's parameters."""

    name: ClassVar[str]
    """The name on the command line and in tables."""
    source: ClassVar[str]
    """The publication, and what of it was read."""
    state_types: ClassVar[tuple[type, ...]] = ()
    """Dataclasses that a state consists of, beside numbers, words, tensors and tuples of them: what a snapshot may hold."""

    @abstractmethod
    def judge(self, feature: Tensor, state: Any) -> tuple[Verdict, Any]:
        """Decide on the next frame group of a stream.

        Args:
            feature: float32 [hidden], mean of the group's vision tokens as the decoder would get them.
            state: what the last call returned; None at the start of a stream. It is never changed, so forks may share it.

        Returns:
            The verdict, and the state for the next call; its size must not grow with the stream.
        """

    @abstractmethod
    def state_bytes(self, hidden: int) -> int:
        """Bytes of the tensors in a state, at most; charged to the budget."""


def admission_consumers(admission: Admission | None, hidden: int) -> tuple[Consumer, Consumer]:
    """What an admission takes of the budget: its state, and the one before it, until a block is in.

    Args:
        admission: None where every frame is let in. hidden: components of the features.
    """
    size = 0 if admission is None else admission.state_bytes(hidden)

    def state(geometry: Geometry, split: Split) -> Line:
        return Line("admission", 0, size, "what it remembers of the stream")

    def undo(geometry: Geometry, split: Split) -> Line:
        return Line("admission's undo", 0, size, "what it remembered before a block", account="undo")

    return state, undo
