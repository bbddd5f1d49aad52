"""What can go wrong in recomputation, beside a budget that is too small (`millpond.errors.BudgetError`)."""

from __future__ import annotations

from millpond.errors import MillpondError

__all__ = ["RecomputeError"]


class RecomputeError(MillpondError):
    """The step cannot be recomputed, or the call cannot work; the message names the cause and what to do."""
