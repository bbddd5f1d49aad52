"""Where the tokens lie: one class for each kind of storage, of which a policy needs one."""

from __future__ import annotations

import torch

from millpond.cache.plan import Plan
from millpond.cache.storage.arena import ArenaStorage
from millpond.cache.storage.base import PerLayerStorage, Storage
from millpond.cache.storage.mixed_precision import MixedPrecisionStorage
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger
from millpond.policies.base import Policy

__all__ = ["ArenaStorage", "MixedPrecisionStorage", "PerLayerStorage", "Storage", "make_storage"]


def make_storage(policy: Policy, geometry: Geometry, plan: Plan, device: torch.device, ledger: Ledger) -> Storage:
    """The storage that a policy needs, allocated as a plan says and entered in the ledger.

    Raises:
        BudgetError: the machine does not have it.
    """
    ledger.hold("storage", plan.slots * geometry.bytes_per_token + plan.quantized_bytes)
    tier = policy.needs.quantized_tier
    if tier is None:
        kind = PerLayerStorage if policy.needs.layer_share == 1 else ArenaStorage
        return kind(geometry, plan, device, ledger)
    return MixedPrecisionStorage(geometry, plan, tier, device, ledger)
