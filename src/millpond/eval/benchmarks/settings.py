"""What is fixed for a run, and the arms that are compared: the asked policies beside four baselines. Knows nothing about videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from millpond import policies
from millpond.config import Positions, SessionConfig
from millpond.eval.accuracy.cell import LAST_FRAMES, REFERENCES

__all__ = ["LAST_FRAMES", "Arm", "Settings", "arms"]


@dataclass(frozen=True)
class Settings:
    """What must not change while answers are added to a folder.

    Attributes:
        benchmark: its name. questions: fingerprint of its annotations.
        model: name of its folder, or its hub id. dtype: of its weights. weights: fingerprint of its config and weights.
        budget: bytes of every arm with a cap. host_budget: beside it, for policies that retrieve.
        fps: frames taken a second. max_frames: of a longer video fewer are taken; None: never. max_pixels: of a frame; None: the model's own.
        positions, recent_frames: as in a `SessionConfig`; recent frames are for the asked policies alone.
        reserve_tokens: slots kept free for a question: what the longest of the benchmark needs.
        versions: of millpond, torch and transformers.
    """

    benchmark: str
    questions: str
    model: str
    dtype: str
    weights: str
    budget: int
    host_budget: int | None
    fps: float
    max_frames: int | None
    max_pixels: int | None
    positions: Positions
    recent_frames: int
    reserve_tokens: int
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Arm:
    """One way to watch: a policy as `millpond.policies.read` takes it, or `LAST_FRAMES`. `asked` ones are not baselines."""

    policy: str
    asked: bool = False

    @property
    def name(self) -> str:
        """In tables, and what its answers are known by."""
        return self.policy

    @property
    def capped(self) -> bool:
        """Whether it lives within the budget."""
        return self.policy != LAST_FRAMES and policies.read(self.policy).capped

    def config(self, settings: Settings) -> SessionConfig:
        """Of its sessions.

        Raises:
            PolicyError: the policy needs what the settings do not give.
        """
        policy = policies.read("full" if self.policy == LAST_FRAMES else self.policy)
        return SessionConfig(
            budget=settings.budget if policy.capped else None,
            policy=policy,
            positions=settings.positions,
            recent_frames=settings.recent_frames if self.asked else 0,
            reserve_tokens=settings.reserve_tokens,
            host_budget=settings.host_budget if policy.needs.retrieved_frames else None,
        )


def arms(names: Sequence[str]) -> list[Arm]:
    """The baselines, and the asked policies behind them; one that is a baseline too is asked.

    Raises:
        PolicyError: a name that cannot be read.
    """
    asked = dict.fromkeys(names)
    for name in asked:
        policies.read(name)
    return [*(Arm(name) for name in REFERENCES if name not in asked), *(Arm(name, True) for name in asked)]
