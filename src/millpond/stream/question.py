"""What can be asked at all."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from millpond.errors import MillpondError


def check_question(question: Any, max_new_tokens: Any) -> None:
    """Raises:
    MillpondError: the question is empty or no text, or `max_new_tokens` is no number from 1 on.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise MillpondError(f"max_new_tokens must be at least 1, not {max_new_tokens!r}")
    if not isinstance(question, str):
        raise MillpondError(f"a question is text, not {question!r}")
    if not question.strip():
        raise MillpondError("the question is empty")
