"""Names and messages as they may be shown on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text in which what a terminal would obey, and bytes that are no text, are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
