"""The budgeted cache: preallocated layers, in-place compaction, a ledger that holds the cap."""

from millpond.cache.pond import Pond
from millpond.memory.ledger import Ledger

__all__ = ["Ledger", "Pond"]
