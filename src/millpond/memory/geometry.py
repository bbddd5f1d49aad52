"""Bytes per token, from a config alone: the only place where they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from millpond.errors import ModelError

# Per kept token and KV head: the stream time in microseconds (int64), the position on the frame's grid (2 x int16) and one
# int32 stream position per rotary axis. Heads keep different tokens, so each head needs its own.
_TIME_BYTES = 8
_GRID_POSITION_BYTES = 4
_POSITION_BYTES = 4
_ATTENTION_BYTES = 4


def metadata_bytes(axes: int) -> int:
    """Bytes of time, grid position and rotary positions that one kept token costs per layer and KV head."""
    return _TIME_BYTES + _GRID_POSITION_BYTES + axes * _POSITION_BYTES


@dataclass(frozen=True)
class Geometry:
    """The shape of a KV cache.

    Attributes:
        layers: decoder layers that keep keys and values.
        kv_heads: KV heads a layer (after grouping, as stored).
        head_dim: components D of a key or value vector.
        dtype: of keys and values.
        axes: rotary position axes, 3 for M-RoPE (t, h, w), 1 for RoPE.
        kv_groups: query heads that share a KV head.
        accumulated_attention: whether a stored token also carries the attention that it received, float32 per KV head.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    axes: int = 1
    kv_groups: int = 1
    accumulated_attention: bool = False

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype, axes: int = 1) -> Geometry:
        """Read the shape from a transformers config (the text config of a multimodal one is found by itself).

        Raises:
            ModelError: some decoder layers keep no plain keys and values (sliding, linear or hybrid attention).
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        supported = "only decoders with full attention in every layer are supported"
        if window is not None and not getattr(text, "layer_types", None):
            raise ModelError(f"{supported}; this one sees {window} tokens back (sliding_window in its config)")
        if kinds != {"full_attention"}:
            raise ModelError(f"{supported}; this one also has {', '.join(sorted(kinds - {'full_attention'}))}")
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            layers=text.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dtype=dtype,
            axes=axes,
            kv_groups=heads // kv_heads,
        )

    @property
    def vector_bytes(self) -> int:
        """Bytes of one key or one value vector of one head."""
        return self.head_dim * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values alone that a token costs over all layers: what a plain cache would take."""
        return self.layers * self.kv_heads * 2 * self.vector_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a stored token costs over all layers, metadata included."""
        metadata = self.layers * self.kv_heads * metadata_bytes(self.axes)
        return self.kv_bytes_per_token + metadata + self.accumulated_attention_bytes

    @property
    def accumulated_attention_bytes(self) -> int:
        """Bytes of the attention that a stored token received, over all layers; 0 where it is not accumulated."""
        return self.layers * self.kv_heads * _ATTENTION_BYTES if self.accumulated_attention else 0

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries over all layers and query heads."""
        return self.layers * self.kv_heads * self.kv_groups * self.vector_bytes
