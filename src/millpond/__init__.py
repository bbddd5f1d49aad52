"""millpond: bounded memory for endless video.

Runs an open multimodal model on video that never ends, inside a memory budget in bytes, and answers questions at any
moment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from millpond.errors import BudgetError, MillpondError, ModelError, PolicyError, SnapshotError, SourceError

if TYPE_CHECKING:
    from millpond.answer import Answer, LayerMemory, Usage
    from millpond.cache.plan import Plan
    from millpond.config import SessionConfig
    from millpond.engine import Engine
    from millpond.memory.budget import Budget
    from millpond.pond_cache import PondCache
    from millpond.session import Session
    from millpond.stream.pending_answer import PendingAnswer

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Budget",
    "BudgetError",
    "Engine",
    "LayerMemory",
    "MillpondError",
    "ModelError",
    "PendingAnswer",
    "Plan",
    "PolicyError",
    "PondCache",
    "Session",
    "SessionConfig",
    "SnapshotError",
    "SourceError",
    "Usage",
    "__version__",
]

# Loaded on first use: importing torch and transformers takes seconds, and `millpond --help` needs neither.
_LATER = {
    "Answer": "millpond.answer",
    "Budget": "millpond.memory.budget",
    "Engine": "millpond.engine",
    "LayerMemory": "millpond.answer",
    "PendingAnswer": "millpond.stream.pending_answer",
    "Plan": "millpond.cache.plan",
    "PondCache": "millpond.pond_cache",
    "Session": "millpond.session",
    "SessionConfig": "millpond.config",
    "Usage": "millpond.answer",
}
_ROOMS = ("frames", "models", "policies", "precision", "recompute", "standing")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _ROOMS:
        return import_module(f"millpond.{name}")
    raise AttributeError(f"module 'millpond' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
