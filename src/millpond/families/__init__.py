"""Model families: one adapter each behind one contract (`base`)."""

from millpond.families.base import NO_PLACE, Family, Grid, Tokens
from millpond.families.registry import Supported, adapt, load, supported

__all__ = ["NO_PLACE", "Family", "Grid", "Supported", "Tokens", "adapt", "load", "supported"]
