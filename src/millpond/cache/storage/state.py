"""What a storage holds, as names and tensors: what a copy of it, or a snapshot on disk, is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["LayerState", "StorageState"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """The live tokens of one layer. The tensors are views of the storage that gave them.

    Attributes:
        length: tokens that are stored as they came. tensors: [H, length, ...] by the layer's names for them.
        groups: quantized groups. quantized: [H, groups, ...] by name.
    """

    length: int
    tensors: Mapping[str, Tensor]
    groups: int = 0
    quantized: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StorageState:
    """All layers.

    Attributes:
        layers: each one's tokens. capacities: slots that each one has.
    """

    layers: tuple[LayerState, ...]
    capacities: tuple[int, ...]
