"""A decoder's queries, shown to whoever runs it: hooks that do nothing while nobody looks.

They see what q_proj gives (behind q_norm, where there is one), before the rotary embedding. Knows nothing about positions,
caches or policies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from millpond.models.transformers_insides import attention, queries_source

See = Callable[[int, Tensor], None]
"""Called with a layer's index and its block's queries [n, query heads, D], right behind that layer's attention or before it."""


class _Look:
    """One running forward that is looked at."""

    def __init__(self, recorder: object, see: See, before: bool) -> None:
        self.recorder, self.see, self.before = recorder, see, before
        self.queries: Tensor | None = None


# Who looks is a matter of the running thread: other sessions on the model, and other users of it, are not looked at.
_looking: ContextVar[_Look | None] = ContextVar("millpond_looking", default=None)


class QueryRecorder:
    """Hooks on the attention of every layer of a decoder; they are gone when the recorder is.

    Args:
        decoder: with `layers`, see `millpond.models.transformers_insides`.
        head_dim: D.
    """

    def __init__(self, decoder: Any, head_dim: int) -> None:
        key = self._key = object()  # the hooks must not keep the recorder alive
        handles = []
        for index, layer in enumerate(decoder.layers):
            block = attention(layer)
            handles.append(queries_source(block).register_forward_hook(_catch(key, index, head_dim)))
            handles.append(block.register_forward_hook(_show(key, index)))
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def showing(self, see: See, *, before: bool = False) -> Iterator[None]:
        """Show every layer's queries of the forwards that this thread runs within: behind the attention, or `before` the cache takes in
        the block's keys."""
        token = _looking.set(_Look(self._key, see, before))
        try:
            yield
        finally:
            _looking.reset(token)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _catch(key: object, index: int, head_dim: int) -> Callable[..., None]:
    @torch.no_grad()
    def hook(module: Any, args: Any, output: Tensor) -> None:
        look = _looking.get()
        if look is not None and look.recorder is key:
            queries = output.detach().reshape(output.shape[1], -1, head_dim)
            if look.before:
                look.see(index, queries)
            else:
                look.queries = queries

    return hook


def _show(key: object, index: int) -> Callable[..., None]:
    @torch.no_grad()
    def hook(module: Any, args: Any, output: Any) -> None:
        look = _looking.get()
        if look is not None and look.recorder is key and look.queries is not None:
            queries, look.queries = look.queries, None
            look.see(index, queries)

    return hook
