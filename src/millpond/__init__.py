"""millpond: bounded memory for endless video.

Runs an open multimodal model on video that never ends, inside a memory budget in bytes, and answers questions at any
moment.
"""

from millpond.answer import Answer, LayerMemory, Usage
from millpond.budget import Budget
from millpond.cache import PondCache
from millpond.errors import BudgetError, MillpondError, ModelError, PolicyError, SnapshotError, SourceError
from millpond.plan import Plan
from millpond.session import Session

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Budget",
    "BudgetError",
    "LayerMemory",
    "MillpondError",
    "ModelError",
    "Plan",
    "PolicyError",
    "PondCache",
    "Session",
    "SnapshotError",
    "SourceError",
    "Usage",
    "__version__",
]
