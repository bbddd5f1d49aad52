"""Forwards of many sessions in one: linear layers see all tokens at once, attention runs for each session over its own memory.

The tokens stand end to end in one sequence, or as a batch of single tokens where every request has one. Attention is reached through
transformers' own door (see `millpond.models.transformers_insides`); a family's methods stay what they are for one session.

What is equal: norms, rotation, the cache and the attention of more than one token treat each token as they would alone, bit for bit. A
linear layer may sum in another order when it has another number of rows, and the heads that share a KV head read it once for a single
token. See docs/batching.md. A request that cannot be packed runs alone, by the family's own `forward`. One that raises gets its error back in its place; what
it left in its memory is for its own step to take back, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from millpond.cache.storage.layer import PondLayer
from millpond.errors import MillpondError
from millpond.models.base import Family, Tokens
from millpond.models.decoder import DecoderFamily
from millpond.models.query_recorder import See
from millpond.models.transformers_insides import Filled, attends_by_sdpa, attention_by, causal_mask, lower_right_mask
from millpond.ops import attend_step, few_rows_product
from millpond.ops.few_rows import FEW, LARGE
from millpond.precision.linear import NestedLinear

ENCODED_AT_ONCE = 256
"""Vision tokens of several streams that go through the tower in one call: beyond, more gain nothing and take memory."""


@dataclass(frozen=True, eq=False)
class Request:
    """One session's forward.

    Attributes:
        tokens, positions, cache: as `Family.forward` takes them; nobody else may use the cache meanwhile.
        see, before: as `Family.showing_queries` takes them; without `see` nobody looks.
    """

    tokens: Tokens
    positions: Tensor
    cache: Any
    see: See | None = None
    before: bool = False


def forward_batch(family: Family, requests: Sequence[Request]) -> list[Tensor | Exception]:
    """`Family.forward` for several sessions, each into a cache of its own, in as few forwards as they allow.

    Returns:
        For each request its last hidden state [n, hidden], or what it raised. A request that raised leaves tokens in its cache, which
        whoever asked for it takes back (see `millpond.stream.step`).

    Raises:
        MillpondError: two requests name one cache.
        Exception: what the model itself raises in the midst of a packed forward; every request's tokens are to be taken back then.
    """
    if len({id(request.cache) for request in requests}) < len(requests):
        raise MillpondError("two requests of one batch name the same cache: run them one behind the other")
    results: dict[int, Tensor | Exception] = {}
    steps: list[int] = []
    blocks: list[int] = []
    by_shape = _depends_on_shape(family)
    for index, request in enumerate(requests):
        step = by_shape and len(request.tokens) == 1
        if not _packable(family, request) or (step and request.tokens.deepstack):
            results[index] = _outcome(_alone, family, request)
        else:
            (steps if step else blocks).append(index)
    for pack in (steps, blocks):
        if len(pack) == 1:
            results[pack[0]] = _outcome(_alone, family, requests[pack[0]])
        elif pack:
            assert isinstance(family, DecoderFamily)
            results.update(zip(pack, _Batch(family, [requests[index] for index in pack]).run(), strict=True))
    return [results[index] for index in range(len(requests))]


def logits_batch(family: Family, hidden: Sequence[Tensor]) -> list[Tensor | Exception]:
    """`Family.logits` for several sessions: a hidden state [hidden] each -> [vocabulary] each, or what it raised."""
    if len(hidden) > 1 and all(one.dim() == 1 and one.shape == hidden[0].shape for one in hidden):
        with _few_rows(family, len(hidden)):
            return list(family.logits(torch.stack(list(hidden))[:, None])[:, 0])
    return [_outcome(family.logits, one) for one in hidden]


def encode_batch(family: Family, blocks: Sequence[tuple[list[np.ndarray], list[int]]]) -> list[Tokens | Exception]:
    """`Family.encode` for several streams, each with its frames and times; those of one size go through the vision tower together.

    Returns:
        For each block its tokens, or what it raised.
    """
    results: dict[int, Tokens | Exception] = {}
    packs: dict[Any, list[int]] = {}
    for index, (frames, _) in enumerate(blocks):
        packs.setdefault(frames[0].shape if frames else None, []).append(index)
    for shape, pack in packs.items():
        tokens = 1 if shape is None else family.grid(*shape[:2]).tokens
        at_once = max(1, ENCODED_AT_ONCE // tokens) * family.frames_per_group
        while pack:
            taken, count = 0, 0
            while taken < len(pack) and (not taken or count + len(blocks[pack[taken]][0]) <= at_once):
                count += len(blocks[pack[taken]][0])
                taken += 1
            part, pack = pack[:taken], pack[taken:]
            results.update(zip(part, _encode(family, [blocks[index] for index in part]), strict=True))
    return [results[index] for index in range(len(blocks))]


def _encode(family: Family, blocks: list[tuple[list[np.ndarray], list[int]]]) -> list[Tokens | Exception]:
    if len(blocks) > 1 and _defined(family, "encode_several") <= _defined(family, "encode"):
        together = _outcome(family.encode_several, blocks)
        if not isinstance(together, Exception):
            return list(together)
    return [_outcome(family.encode, *block) for block in blocks]  # also to see whose fault it is


def _defined(family: Family, name: str) -> int:
    """How many classes away a method is defined: one that stands nearer knows nothing of one behind it."""
    return next(index for index, kind in enumerate(type(family).__mro__) if name in vars(kind))


def _outcome(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or the error that it raised."""
    try:
        return run(*arguments)
    except Exception as error:
        return error


def _alone(family: Family, request: Request) -> Tensor:
    with family.showing_queries(request.see, before=request.before) if request.see else nullcontext():
        return family.forward(request.tokens, request.positions, request.cache)


def _depends_on_shape(family: Family) -> bool:
    """Whether linears tell a decoding step by the shape of what they are given; see `NestedLinear`."""
    decoder = getattr(family, "decoder", None)
    return decoder is not None and any(isinstance(module, NestedLinear) for module in decoder.layers[0].modules())


def _packable(family: Family, request: Request) -> bool:
    if not isinstance(family, DecoderFamily) or type(family).forward is not DecoderFamily.forward:
        return False
    tokens, cache, axes = request.tokens, request.cache, int(family.geometry.axes)
    return (
        attends_by_sdpa(family.decoder)
        and isinstance(cache, Cache)
        and getattr(cache, "copies", False)
        and type(cache).update is Cache.update  # one that counts what arrives is asked by transformers itself
        and tokens.embeds.shape[1:] == (family.hidden,)
        and tokens.embeds.dtype == family.geometry.dtype
        and tokens.embeds.device == family.device
        and 0 < len(tokens) == len(tokens.visual)
        and request.positions.shape == (axes, len(tokens))
        and (not tokens.deepstack or all(len(layer) == int(tokens.visual.sum()) for layer in tokens.deepstack))
    )


class _LinearOfFewRows(TorchFunctionMode):
    """Within it, this thread's linear layers are `millpond.ops.few_rows_product`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (few_rows_product if func is linear else func)(*args, **(kwargs or {}))


def _few_rows(family: Family, rows: int) -> AbstractContextManager[Any]:
    """For a few tokens of a model that is large enough to be worth the asking at every call into torch."""
    large = getattr(family, "hidden", 0) ** 2 >= LARGE and family.geometry.dtype == torch.float32
    return _LinearOfFewRows() if large and rows <= FEW and family.device.type == "cpu" else nullcontext()


class _Run:
    """One request within a batch.

    Attributes:
        error: what it raised; from then on it takes no part.
    """

    def __init__(self, family: DecoderFamily, request: Request) -> None:
        self.count = len(request.tokens)
        self.layers, self.see, self.before = request.cache.layers, request.see, request.before
        self.uneven = getattr(request.cache, "uneven", False)
        self.error: Exception | None = None
        self._mask = None if self.uneven else causal_mask(family.decoder, request.cache, request.tokens.embeds[None])
        # On an empty cache the causal mask is torch's own.
        self._causal = not self.uneven and self._mask is None and self.count > 1
        geometry = family.geometry
        made = geometry.kv_heads, geometry.head_dim, geometry.dtype
        self._plain = self.count == 1 and all(
            type(layer) is PondLayer and (layer.keys.shape[1], layer.keys.shape[3], layer.dtype) == made
            for layer in self.layers
        )

    def look(self, index: int, queries: Tensor, *, before: bool) -> None:
        """Show a layer's queries [n, query heads, D], if it is time."""
        if self.see is not None and self.before == before and self.error is None:
            try:
                self.see(index, queries)
            except Exception as error:
                self.error = error

    def is_step(self, index: int) -> bool:
        """Whether all that there is to do in a layer is a plain decoding step."""
        return self._plain and self.error is None and self.layers[index].length < self.layers[index].capacity

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Append keys and values [1, KV heads, n, D], and return what queries [1, heads, n, D] gather: [1, n, heads, D]."""
        try:
            keys, values = self.layers[index].update(key, value)
            mask = lower_right_mask(query, keys.shape[2]) if self.uneven else self._mask
            return scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=self._causal, scale=scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            ).transpose(1, 2)  # fmt: skip
        except Exception as error:
            self.error = error
            return self.nothing(query)

    def fill(self, index: int, key: Tensor, value: Tensor) -> None:
        """Append keys and values [1, KV heads, n, D], and no more."""
        try:
            self.layers[index].update(key, value)
        except Exception as error:
            self.error = error

    def nothing(self, query: Tensor) -> Tensor:
        """In the place of what a request gathers that has raised."""
        return torch.zeros_like(query).transpose(1, 2)


class _Batch:
    """One packed forward; stands in for its cache and its attention.

    Args:
        requests: all of them packable.
    """

    def __init__(self, family: DecoderFamily, requests: Sequence[Request]) -> None:
        self._family, self._requests = family, requests
        self._runs = [_Run(family, request) for request in requests]
        self._counts = [run.count for run in self._runs]
        self._starts = [0, *accumulate(self._counts)][:-1]
        self._steps = max(self._counts) == 1 and not any(request.tokens.deepstack for request in requests)
        self._filling = not self._steps and all(getattr(request.cache, "filling", False) for request in requests)
        self._looked_at = [run for run in self._runs if run.see is not None]
        self._queries: Sequence[Tensor] = ()
        self._index = 0

    def run(self) -> list[Tensor | Exception]:
        """The forward: for each request its hidden states, or what it raised."""
        family = self._family
        tokens = Tokens.join([_comparable(request.tokens) for request in self._requests])
        positions = torch.cat([request.positions for request in self._requests], dim=1)
        embeds, positions = (
            tokens.embeds.unsqueeze(1 if self._steps else 0),
            positions.unsqueeze(2 if self._steps else 1),
        )
        with (
            family.showing_queries(self._catch, before=True) if self._looked_at else nullcontext(),
            attention_by(family.decoder, self._attend),
            _few_rows(family, sum(self._counts)),
            torch.inference_mode(),
            suppress(Filled),
        ):
            hidden = family.decode(tokens, embeds, positions, self, embeds.new_zeros(1, 1, 1, 1))
        if self._filling:
            return [tokens.embeds[:0] if run.error is None else run.error for run in self._runs]
        rows = hidden.flatten(0, 1).split(self._counts)
        return [each.clone() if run.error is None else run.error for run, each in zip(self._runs, rows, strict=True)]

    def get_seq_length(self, layer: int = 0) -> int:
        """Nothing is known here of the caches' lengths, and nobody needs them: positions and masks are given."""
        return 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Leave keys and values to `_attend`, which is called next; at the end of a forward that only fills, take them in."""
        self._index = layer
        if self._filling and layer == len(self._runs[0].layers) - 1:
            parts = keys.split(self._counts, dim=2), values.split(self._counts, dim=2)
            for run, own_keys, own_values in zip(self._runs, *parts, strict=True):
                if run.error is None:
                    run.fill(layer, own_keys, own_values)
            raise Filled
        return keys, values

    def _catch(self, index: int, queries: Tensor) -> None:
        self._queries = queries.reshape(sum(self._counts), -1, queries.shape[-1]).split(self._counts)
        for run, own in zip(self._runs, self._queries, strict=True):
            run.look(index, own, before=True)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        steps = [index for index, run in enumerate(self._runs) if run.is_step(self._index)]
        stepped = self._step(steps, (query, key, value), scaling) if steps else ()
        if isinstance(stepped, Tensor) and len(steps) == len(self._runs):
            gathered = stepped if self._steps else stepped.transpose(0, 1)
        else:
            gathered = self._each(dict(zip(steps, stepped, strict=True)), (query, key, value), scaling)
        if self._looked_at:
            for run, queries in zip(self._runs, self._queries, strict=True):
                run.look(self._index, queries, before=False)
        return gathered

    def _step(self, steps: list[int], projected: Sequence[Tensor], scaling: float) -> Tensor:
        """The plain decoding steps, all at once: [requests, 1, heads, D]."""
        layers = [self._runs[index].layers[self._index] for index in steps]
        rows = [tensor.squeeze(2) if self._steps else tensor[0].transpose(0, 1) for tensor in projected]
        if len(steps) < len(self._counts):
            at = torch.tensor([self._starts[index] for index in steps], device=rows[0].device)
            rows = [tensor.index_select(0, at) for tensor in rows]
        query, key, value = (tensor.contiguous() for tensor in rows)
        gathered = attend_step(query, key, value, [(each.keys, each.values, each.length) for each in layers], scaling)
        for layer in layers:
            layer.length += 1
        return gathered[:, None]

    def _each(self, done: dict[int, Tensor], projected: Sequence[Tensor], scaling: float) -> Tensor:
        """Request by request, but for those that are `done`."""
        axis, gathered = 0 if self._steps else 2, []
        parts = (tensor.split(1 if self._steps else self._counts, dim=axis) for tensor in projected)
        for index, (run, query, key, value) in enumerate(zip(self._runs, *parts, strict=True)):
            if index in done:
                gathered.append(done[index][None])
            elif run.error is None:
                gathered.append(run.attend(self._index, query, key, value, scaling))
            else:
                gathered.append(run.nothing(query))
        return torch.cat(gathered, dim=0 if self._steps else 1)


def _comparable(tokens: Tokens) -> Tokens:
    """The same, to stand beside tokens that carry features for deeper layers."""
    return tokens if tokens.deepstack else replace(tokens, visual=torch.zeros_like(tokens.visual))
