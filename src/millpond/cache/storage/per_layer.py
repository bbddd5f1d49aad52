"""The plainest storage: every layer has tensors of its own, all of one length."""

from __future__ import annotations

import torch

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Storage
from millpond.cache.storage.layer import PondLayer
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger

__all__ = ["PerLayerStorage"]


class PerLayerStorage(Storage):
    """`Plan.slots` slots in every layer."""

    def __init__(self, geometry: Geometry, plan: Plan, device: torch.device, ledger: Ledger) -> None:
        layers = [PondLayer(geometry, plan.slots, device) for _ in range(geometry.layers)]
        super().__init__(geometry, layers, ledger)
