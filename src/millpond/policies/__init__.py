"""What survives when the memory is at its cap: one published method a file, one contract in `base`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.policies.base import SEPARATOR, TEXT, Needs, Policy, Scorer, View, keep_top
    from millpond.policies.registry import available, get, read, write

__all__ = [
    "DEFAULT_POLICY",
    "SEPARATOR",
    "TEXT",
    "Needs",
    "Policy",
    "Scorer",
    "View",
    "available",
    "get",
    "keep_top",
    "read",
    "write",
]

DEFAULT_POLICY = "infinipot-v"
"""The policy of a session, a cache and the command line where none is named."""

# Loaded on first use: the command line's help names the default policy and needs no torch.
_LATER = dict.fromkeys(("SEPARATOR", "TEXT", "Needs", "Policy", "Scorer", "View", "keep_top"), "base")
_LATER |= dict.fromkeys(("available", "get", "read", "write"), "registry")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"millpond.policies.{_LATER[name]}"), name)
    raise AttributeError(f"module 'millpond.policies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
