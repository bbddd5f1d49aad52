"""One step of a stream, a block of frames or a turn: wholly in, or as if it had not begun.

A step remembers what the stream was when it began, and puts it back when anything is raised before it is committed, a
KeyboardInterrupt or the end of a generator included. Memory is not copied for that: what a step appends lies behind what was there,
and is forgotten by its length. Only what a forward changes in place is copied: the queries of a
proxy text and the sums of attention. The latest frames' queries, where a policy looks at those, stay what each layer saw last.

Moves of the memory (compaction, re-anchoring, another size) stand outside of steps and are whole by themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from millpond.cache.tier import MixedPrecisionLayer

if TYPE_CHECKING:
    from millpond.cache.pond import Pond
    from millpond.stream.ingest import Ingest
    from millpond.stream.runner import Runner

__all__ = ["Step"]


class Step:
    """Begun when made; then `commit`, or `roll_back`. Until then it is the runner's `open_step`: where rolling back is interrupted too, the
    session's next call goes on with it.

    Args:
        flow, intake: the stream.
        queries, sums: whether the step's forwards note queries, or add to the sums of attention; what there was is copied then, which
            the plan counts as `undo_bytes`.
    """

    def __init__(
        self, runner: Runner, ingest: Ingest, *, queries: bool = False, accumulated_attention: bool = False
    ) -> None:
        self._runner, self._ingest = runner, ingest
        pond = runner.pond
        self.start = pond.length
        self._clock, self._tokens, self._seen = replace(runner.clock), runner.tokens, runner._seen
        self._recent, self._text = pond._recent.copy(), pond._text
        self._standing, self._recent_frames = ingest.at, ingest._recent_frames.groups
        self._counts = list(pond.queries.counts)
        self._queries: Tensor | None = None
        self._sums: list[Tensor] = []
        self._open = True
        runner.open_step = self
        try:
            pond.ledger.hold("undo", pond.plan.undo_bytes)
            if queries and pond.plan.query_bytes:
                self._queries = pond.queries.rows.clone()
            if accumulated_attention and pond.geometry.accumulated_attention:
                self._sums = [live.clone() for live in _live_sums(pond, self.start)]
        except BaseException:
            self._let_go()
            raise

    def commit(self) -> None:
        """The step is in: from here on nothing takes it back."""
        self._open = False
        self._let_go()

    def roll_back(self) -> None:
        """Put everything back, unless the step is in already. Whatever interrupts this, it can be called again."""
        if self._open:
            runner, ingest, pond = self._runner, self._ingest, self._runner.pond
            pond.truncate(self.start)
            pond._recent, pond._text = self._recent.copy(), self._text
            if self._queries is not None:
                pond.queries.rows.copy_(self._queries)
                pond.queries.counts = list(self._counts)
            for live, saved in zip(_live_sums(pond, self.start) if self._sums else (), self._sums, strict=True):
                live.copy_(saved)
            runner.clock, runner.tokens, runner._seen = replace(self._clock), self._tokens, self._seen
            ingest._recent_frames.groups, ingest.at = self._recent_frames, self._standing
            self._open = False
        self._let_go()

    def _let_go(self) -> None:
        self._queries, self._sums = None, []
        self._runner.pond.ledger.hold("undo", 0)
        self._ingest.book()
        self._runner.open_step = None


def _live_sums(pond: Pond, start: int) -> list[Tensor]:
    """Views of the sums of all tokens in front of slot `start` of the first layer, packed ones included."""
    found = []
    for layer, ahead in zip(pond.layers, pond._ahead, strict=True):
        found.append(layer.accumulated_attention[:, : start + ahead])
        if isinstance(layer, MixedPrecisionLayer) and layer.quantized_store.accumulated_attention is not None:
            found.append(layer.quantized_store.accumulated_attention[:, : layer.quantized_store.groups])
    return found
