"""What all cells of a stream have in common, run once: the vision tower, and the decoder until a session forgets its first token.

Until then every policy under every budget holds the same memory. Knows model families and ponds; nothing about policies or questions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from torch import Tensor

from millpond.cache import Pond
from millpond.models.base import Family, Tokens
from millpond.models.query_recorder import See


@dataclass(frozen=True)
class _Block:
    """What the decoder made of a block: hidden states, each layer's keys, values and queries, and how long it took."""

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    seconds: float


class SharedStream:
    """A family for all sessions that watch one stream from its beginning, one after the other.

    Attributes:
        family: behaves as the one given. `encode` remembers what it was asked, by the group's time; `forward` remembers blocks of
            frames in front of which nothing has been forgotten, and gives the next session's cache the same keys and values and its
            policy the same queries.
        spared: seconds of decoding that were not spent again, since it was last set to 0.
    """

    def __init__(self, family: Family) -> None:
        self.family = copy.copy(family)
        self.spared = 0.0
        self._look, self._decode, self._show = family.encode, family.forward, family.showing_queries
        self._seen: dict[tuple[int, ...], Tokens] = {}
        self._blocks: dict[tuple[int, bytes, bytes], _Block] = {}
        self._see: See | None = None
        self.family.encode = self._encode  # type: ignore[method-assign]
        self.family.forward = self._forward  # type: ignore[method-assign]
        self.family.showing_queries = self._showing_queries  # type: ignore[method-assign]

    def _encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        size = self.family.frames_per_group
        parts = []
        for first in range(0, len(frames), size):
            times = tuple(times_us[first : first + size])
            if times not in self._seen:
                self._seen[times] = self._look(frames[first : first + size], list(times))
            parts.append(self._seen[times])
        return Tokens.join(parts)

    @contextmanager
    def _showing_queries(self, see: See, *, before: bool = False) -> Iterator[None]:
        if before:  # a question's: never shared
            with self._show(see, before=True):
                yield
            return
        self._see = see
        try:
            yield
        finally:
            self._see = None

    def _forward(self, tokens: Tokens, positions: Tensor, cache: Pond) -> Tensor:
        see = self._see
        if cache.compactions or not bool(tokens.visual.all()):
            if see is None:
                return self._decode(tokens, positions, cache)
            with self._show(see):
                return self._decode(tokens, positions, cache)
        # Of one stream, as many tokens before these, at these times and positions, are always the same.
        key = cache.length, tokens.time_us.numpy().tobytes(), positions.cpu().numpy().tobytes()
        began = perf_counter()
        if (block := self._blocks.get(key)) is None:
            block = self._blocks[key] = self._run(tokens, positions, cache)
            return block.hidden
        for index, (keys, values) in enumerate(zip(block.keys, block.values, strict=True)):
            cache.update(keys, values, index)
            if see is not None:
                see(index, block.queries[index])
        self.spared += block.seconds - (perf_counter() - began)
        return block.hidden

    def _run(self, tokens: Tokens, positions: Tensor, cache: Pond) -> _Block:
        see, queries, start, began = self._see, [], cache.length, perf_counter()

        def note(index: int, asked: Tensor) -> None:
            queries.append(asked.clone())
            if see is not None:
                see(index, asked)

        cache.filling = False  # the queries of every layer are looked at, for sessions that need them
        with self._show(note):
            hidden = self._decode(tokens, positions, cache)
        seconds = perf_counter() - began
        part = slice(start, cache.length)
        keys = [layer.keys[:, :, part].clone() for layer in cache.layers]
        values = [layer.values[:, :, part].clone() for layer in cache.layers]
        return _Block(hidden, keys, values, queries, seconds)
