"""Each layer's own causal mask, where a cache's layers hold different numbers of tokens.

transformers builds one mask for all layers, from the first one's length. A hook on every attention puts the layer's own in its
place; it looks at the cache that comes with the call, so sessions that share a model do not see each other's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from millpond.errors import ModelError

__all__ = ["give_layers_their_masks"]


def give_layers_their_masks(decoder: nn.Module) -> None:
    """Hook every attention of a decoder, once; a call whose cache is even passes through untouched."""
    for layer in decoder.layers:  # type: ignore[union-attr]
        attention = layer.self_attn
        if _own_mask not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_own_mask, with_kwargs=True)


def _own_mask(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = kwargs.get("past_key_values")
    if cache is None or not getattr(cache, "uneven", False):
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = _causal(attention.config._attn_implementation, hidden, cache.layers[attention.layer_idx].length)
    return args, {**kwargs, "attention_mask": mask}


def _causal(implementation: str, hidden: Tensor, past: int) -> Tensor | None:
    """The lower-right causal mask of the new tokens in `hidden` [1, n, hidden] behind `past` stored ones."""
    count = hidden.shape[1]
    if count == 1 or implementation.startswith("flash_attention"):
        return None  # one query sees everything, and flash attention aligns to the lower right by itself
    seen = torch.ones(count, past + count, dtype=torch.bool, device=hidden.device).tril_(past)[None, None]
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, torch.finfo(hidden.dtype).min)
    raise ModelError(
        f"layer budgets need attn_implementation 'sdpa', 'eager' or 'flash_attention_2', not {implementation!r}"
    )
