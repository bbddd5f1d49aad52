"""What millpond takes from the insides of transformers that its documentation does not promise, in one place.

Names of arguments and of modules inside a decoder, and the one thing that transformers' masks cannot express: layers of one
cache that hold different numbers of tokens. `tests/models/test_transformers_insides.py` says in words what changed when a
release moves one of them. Knows nothing about sessions, budgets or policies.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from millpond.errors import ModelError

LAST_TESTED = (5, 24)
"""The newest minor version of transformers that the tests have passed on."""


@cache
def warn_above_last_tested() -> None:
    """Warn, once a process, where transformers is newer than `LAST_TESTED`."""
    found = transformers.__version__
    if tuple(int(part) for part in found.split(".")[:2]) > LAST_TESTED:
        last = ".".join(map(str, LAST_TESTED))
        warnings.warn(
            f"transformers {found} is newer than {last}, the last version that millpond was tested on", stacklevel=3
        )


def cache_argument(decoder: type) -> str:
    """The name under which a decoder's class takes its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    taken = inspect.signature(decoder.forward).parameters  # type: ignore[attr-defined]
    return next(name for name in ("cache", "past_key_values") if name in taken)


def decoder_of(model: Any) -> Any:
    """The decoder, with `layers` and without the head, of a causal language model or a multimodal one."""
    found = model.get_decoder()
    return getattr(found, "language_model", found)


def rotated(decoder: Any, queries: Tensor, position: int) -> Tensor | None:
    """Queries [1, heads, 1, D] as the decoder itself rotates them at a position; None where it has no plain rotary embedding."""
    rotate = getattr(sys.modules[type(attention(decoder.layers[0])).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not hasattr(decoder, "rotary_emb"):
        return None
    at = torch.tensor([[position]], device=queries.device)
    turned: Tensor = rotate(queries, queries, *decoder.rotary_emb(queries, at))[0]
    return turned


def attention(layer: Any) -> nn.Module:
    """The self-attention of one of a decoder's `layers`."""
    module: nn.Module = layer.self_attn
    return module


def queries_source(attention: Any) -> nn.Module:
    """The module whose output is a block's queries [1, n, query heads * D] or [1, n, query heads, D], before their rotation."""
    module: nn.Module = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
    return module


def vision_layout(tower: Any, grid: Tensor) -> dict[str, Tensor]:
    """What a Qwen vision tower works out from the grid alone, under the names by which it takes it ready-made.

    Args:
        tower: of Qwen2-VL, Qwen2.5-VL or Qwen3-VL. grid: int64 [1, 3], groups, rows and columns of patches, on the tower's device.
    """
    layout = {
        "position_ids": get_vision_position_ids(grid, tower.spatial_merge_size),
        "cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if hasattr(tower, "window_size"):
        layout["window_index"], layout["cu_window_seqlens"] = get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
    return layout


def causal_mask(decoder: Any, cache: Any, embeds: Tensor) -> Tensor | None:
    """The mask of a forward over embeds [1, n, hidden] behind what `cache` holds in every layer, in the one form in which every layer
    takes it without a conversion of its own: float [1, 1, n, keys], 0 where seen.

    None where a decoder does without, or makes a better one itself: for one token, on an empty cache, and for attention that is
    neither "sdpa" nor "eager".
    """
    count = embeds.shape[1]
    if count == 1 or decoder.config._attn_implementation.removeprefix("millpond_") not in ("sdpa", "eager"):
        return None
    keys, _ = cache.get_mask_sizes(count, 0)
    return _additive(count, keys, embeds) if keys > count else None


# --- a forward whose output nobody reads --------------------------------------------------------------------------


class Filled(Exception):
    """The last layer has its keys and values, and nobody needs what follows."""


class _EndsFilled(Cache):
    """Stands for another cache in a forward that ends as soon as the last layer has its keys and values."""

    def __init__(self, cache: Any) -> None:
        super().__init__(layers=cache.layers)
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        shown = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            raise Filled
        return shown


def fill(run: Callable[[Any], Any], cache: Any) -> None:
    """Call `run`, a decoder's forward, with a cache that has all its layers; what would follow the last layer's keys is left out.

    That is the last layer's attention and MLP: what a cache remembers does not depend on them.
    """
    with suppress(Filled):
        run(_EndsFilled(cache))


# --- layers that hold different numbers of tokens -----------------------------------------------------------------

# transformers builds one mask for all layers, from the first one's length. Its documented door to attention, the
# `AttentionInterface`, sees each layer's own keys, and what their number says is the whole mask at batch 1: every new token
# sees all stored ones, and the new ones up to itself. The flag belongs to the running thread, so other users of the model,
# and other sessions, get exactly the attention that they would have had.
_own_lengths: ContextVar[bool] = ContextVar("millpond_own_lengths", default=False)


@contextmanager
def layers_of_different_lengths(decoder: Any) -> Iterator[None]:
    """Within it, this thread's forwards of `decoder` at batch 1 may have layers that hold different numbers of tokens.

    The first time, the decoder's attention implementation is set to one of ours that behaves as its own does everywhere else.

    Raises:
        ModelError: the attention implementation is none of "sdpa", "eager" and flash attention.
    """
    if not decoder.config._attn_implementation.startswith(
        "flash_attention"
    ):  # which aligns to the lower right by itself
        _attend_by_ours(decoder)
    token = _own_lengths.set(True)
    try:
        yield
    finally:
        _own_lengths.reset(token)


# --- attention by whoever runs the forward -------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Called, behind the cache's `update`, with rotated queries [B, heads, n, D], with the keys and values that the cache gave, and with the
scaling; returns what the queries gather, [B, n, heads, D]."""

_attend: ContextVar[Attend | None] = ContextVar("millpond_attend", default=None)


def attends_by_sdpa(decoder: Any) -> bool:
    """Whether a decoder's attention is torch's `scaled_dot_product_attention`."""
    implementation: str = decoder.config._attn_implementation
    return implementation.removeprefix("millpond_") == "sdpa"


@contextmanager
def attention_by(decoder: Any, attend: Attend) -> Iterator[None]:
    """Within it, `attend` stands in for the attention of this thread's forwards of `decoder`; the same door, and the same rule for others'
    use of the model, as for `layers_of_different_lengths`."""
    _attend_by_ours(decoder)
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def _attend_by_ours(decoder: Any) -> None:
    implementation = decoder.config._attn_implementation
    if implementation.startswith("millpond_"):
        return
    if implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"layer budgets need attn_implementation 'sdpa', 'eager' or 'flash_attention_2', not {implementation!r}"
        )
    decoder.set_attn_implementation(_registered(implementation))


@cache
def _registered(implementation: str) -> str:
    name = f"millpond_{implementation}"
    attend = _eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    AttentionInterface.register(name, _by_own_length(attend, additive=implementation == "eager"))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _by_own_length(attend: Callable[..., Any], additive: bool) -> Callable[..., Any]:
    def attend_by_own_length(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if (own := _attend.get()) is not None:
            return own(query, key, value, kwargs["scaling"]), None
        if _own_lengths.get():
            attention_mask = lower_right_mask(query, key.shape[2], additive)
        return attend(module, query, key, value, attention_mask, **kwargs)

    return attend_by_own_length


def lower_right_mask(query: Tensor, keys: int, additive: bool = False) -> Tensor | None:
    """The lower-right causal mask of queries [1, heads, n, D] that are the last n of `keys` tokens: [1, 1, n, keys].

    None for a single query, which sees everything.
    """
    count = query.shape[2]
    if count == 1:
        return None
    if additive:
        return _additive(count, keys, query)
    return torch.ones(count, keys, dtype=torch.bool, device=query.device).tril_(keys - count)[None, None]


def _additive(count: int, keys: int, like: Tensor) -> Tensor:
    """The least number where one of the last `count` of `keys` tokens does not look, else 0: [1, 1, count, keys], dtype and device as `like`."""
    least = torch.finfo(like.dtype).min
    mask = torch.full((count, keys), least, dtype=like.dtype, device=like.device)
    return mask.triu_(keys - count + 1)[None, None]


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which each model file has for itself and no registry holds; weights [1, heads, n, keys] too."""
    groups = module.num_key_value_groups
    weights = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    attended = weights @ value.repeat_interleave(groups, dim=1)
    return attended.transpose(1, 2).contiguous(), weights
