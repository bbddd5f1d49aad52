"""The low-bit tier in numbers: what share of a memory is quantized, and the bytes that this takes.

Arithmetic only; the tokens lie in `millpond.cache.storage`.
"""

from __future__ import annotations

from dataclasses import dataclass

from millpond.errors import PolicyError
from millpond.kv_quantization.quantizer import KVQuantizer
from millpond.memory.geometry import Geometry


@dataclass(frozen=True)
class QuantizedTier:
    """How much of a memory is quantized, and how.

    Attributes:
        quantizer: how. full_share: of the remembered tokens, how many stay as they are.

    Raises:
        PolicyError: a share that is not between 0 and 1.
    """

    quantizer: KVQuantizer
    full_share: float

    def __post_init__(self) -> None:
        if not 0 < self.full_share < 1:
            raise PolicyError(f"full_share must lie between 0 and 1, not {self.full_share}")

    def quantized_tokens(self, memory: int) -> int:
        """Tokens to quantize beside `memory` tokens in full: whole groups, and at least one."""
        group = self.quantizer.group
        return max(group, int(memory * (1 / self.full_share - 1)) // group * group)

    def quantized_bytes(self, geometry: Geometry, tokens: int) -> int:
        """Storage of `tokens` quantized tokens over all layers, metadata included."""
        beside = geometry.bytes_per_token - geometry.kv_bytes_per_token
        groups = geometry.layers * geometry.kv_heads * (tokens // self.quantizer.group)
        return groups * self.quantizer.group_bytes(geometry.head_dim) + tokens * beside

    def dequantization_bytes(self, geometry: Geometry, tokens: int) -> int:
        """One layer's keys and values of `tokens` tokens in the model's dtype."""
        return geometry.kv_heads * 2 * tokens * geometry.vector_bytes

    def step(self, chunk: int) -> int:
        """Tokens coded at a time: whole groups, `chunk` tokens or one group."""
        return max(1, chunk // self.quantizer.group) * self.quantizer.group

    def quantization_bytes(self, geometry: Geometry, chunk: int) -> int:
        """What quantizing and dequantizing take at a time."""
        step = self.step(chunk)
        return self.quantizer.scratch_bytes(step, geometry.head_dim) + step * (2 * 4 + 8) * geometry.head_dim

    def choosing_bytes(self, geometry: Geometry, full: int, quantized: int) -> int:
        """What choosing among the quantized tokens takes beside the policy; `full` and `quantized` tokens of a layer."""
        # [H, n]: order, time, grid position, protection, accumulated attention, and which full ones stay or leave.
        each = 8 + 8 + 4 + 1 + 4 * geometry.accumulated_attention
        return geometry.kv_heads * ((full + quantized) * each + 8 * full)

    def sorting_bytes(self, tokens: int) -> int:
        """What putting one head's tokens in order takes, before the policy sees them."""
        return 48 * tokens

    def rerotation_bytes(self, geometry: Geometry, tokens: int) -> int:
        """What rerotating `tokens` of a layer to new positions takes: one head's order, positions and shifts."""
        return (40 + 20 * geometry.axes) * tokens
