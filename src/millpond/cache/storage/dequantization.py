"""Where the quantized tokens of one layer are dequantized for attention, beside its full ones; one for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from millpond.cache.plan import Plan
from millpond.cache.storage.exchange import zeros
from millpond.cache.storage.quantized_store import QuantizedStore
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.memory.ledger import Ledger

__all__ = ["DequantizationBuffer"]


class DequantizationBuffer:
    """Where one layer's tokens of both kinds lie side by side in the model's dtype: keys, values [1, H, n, D], shared.

    What one layer put here is gone when the next one has.
    """

    def __init__(
        self, geometry: Geometry, plan: Plan, tier: QuantizedTier, device: torch.device, ledger: Ledger
    ) -> None:
        self.geometry, self.tier, self.device, self.ledger = geometry, tier, device, ledger
        self.allocate(plan)

    def allocate(self, plan: Plan) -> None:
        """Make it as large as a plan says."""
        self.step = self.tier.step(plan.chunk)
        self.quantization_bytes = self.tier.quantizer.scratch_bytes(self.step, self.geometry.head_dim)
        self.ledger.hold("dequantization buffer", plan.dequantization_bytes)
        shape = 1, self.geometry.kv_heads, plan.quantized_tokens + plan.slots, self.geometry.head_dim
        self.keys = zeros(shape, self.geometry.dtype, self.device)
        self.values = zeros(shape, self.geometry.dtype, self.device)

    def clear(self) -> None:
        """Give the storage back."""
        self.keys = self.values = self.keys.new_empty(0)
        self.ledger.hold("dequantization buffer", 0)

    def dequantize(self, store: QuantizedStore, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Dequantize a store and put a layer's full keys and values [1, H, n, D] behind it; returns views of both."""
        quantized = store.tokens
        end = quantized + keys.shape[2]
        with self.ledger.borrow("scratch", self.quantization_bytes):
            for head, (own, other) in enumerate(zip(self.keys[0], self.values[0], strict=True)):
                store.read(head, 0, quantized, own[:quantized], other[:quantized], self.step)
        self.keys[:, :, quantized:end].copy_(keys)
        self.values[:, :, quantized:end].copy_(values)
        return self.keys[:, :, :end], self.values[:, :, :end]
