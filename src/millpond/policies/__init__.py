"""What survives when the memory is at its cap: one published method a file, one contract in `base`."""

from millpond.policies.base import SEPARATOR, TEXT, Policy, View, keep_top
from millpond.policies.registry import available, get, read, write

__all__ = ["SEPARATOR", "TEXT", "Policy", "View", "available", "get", "keep_top", "read", "write"]
