"""The budgeted cache: preallocated layers, in-place compaction, a ledger that holds the cap."""

from millpond.cache.ledger import Ledger
from millpond.cache.pond import Pond
from millpond.cache.standalone import PondCache

__all__ = ["Ledger", "Pond", "PondCache"]
