"""Model families: one adapter each behind one contract (`base`)."""

from millpond.models.base import NO_GRID_POSITION, Family, Grid, Tokens
from millpond.models.registry import Supported, adapt, load, supported

__all__ = ["NO_GRID_POSITION", "Family", "Grid", "Supported", "Tokens", "adapt", "load", "supported"]
