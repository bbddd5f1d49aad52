"""Token ids to pieces of text, as they come. Knows a tokenizer's `decode` and nothing else."""

from __future__ import annotations

from typing import Any

__all__ = ["TextPieces"]


class TextPieces:
    """Turns a growing list of token ids into pieces of text whose concatenation is the whole.

    A byte-level tokenizer may need several tokens for one character; a piece is held back while it ends in one that is not
    finished.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.whole = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, possibly empty."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith("\ufffd") else self._emit(text)

    def finish(self) -> str:
        """What was held back."""
        return self._emit(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _emit(self, text: str) -> str:
        piece, self.whole = text[len(self.whole) :], text
        return piece
