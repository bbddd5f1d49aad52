"""What a pond is, in full: to copy it from, and to go back to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from millpond.cache.host import HostCacheState
from millpond.cache.plan import Plan
from millpond.cache.proxy_queries import QueriesState
from millpond.cache.recent import RecentWindow
from millpond.cache.storage.base import StorageState

__all__ = ["Mark", "PondState"]


@dataclass(frozen=True, eq=False)
class PondState:
    """Everything that a stream's memory goes on with. Its tensors are views of the pond that gave it.

    Attributes:
        plan: how the budget is split. storage, queries, host: the tokens; the proxy's queries; host memory, None without any.
        recent, compactions, evicted: as in `millpond.cache.pond.Pond`.
    """

    plan: Plan
    storage: StorageState
    queries: QueriesState
    host: HostCacheState | None
    recent: RecentWindow
    compactions: int
    evicted: int


@dataclass(frozen=True, eq=False)
class Mark:
    """Where a step of a stream began: what is needed to take back what it appends.

    Attributes:
        length: live slots of the first layer. recent: as in the pond.
        queries, accumulated_attention: copies of what a forward changes in place; None and empty where it does not.
    """

    length: int
    recent: RecentWindow
    queries: QueriesState | None
    accumulated_attention: tuple[Tensor, ...]
