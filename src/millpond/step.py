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

from millpond.cache.tier import TieredLayer

if TYPE_CHECKING:
    from millpond.cache.pond import Pond
    from millpond.flow import Flow
    from millpond.intake import Intake

__all__ = ["Step"]


class Step:
    """Begun when made; then `commit`, or `roll_back`. Until then it is the flow's `open_step`: where rolling back is interrupted too, the
    session's next call goes on with it.

    Args:
        flow, intake: the stream.
        queries, sums: whether the step's forwards note queries, or add to the sums of attention; what there was is copied then, which
            the plan counts as `undo_bytes`.
    """

    def __init__(self, flow: Flow, intake: Intake, *, queries: bool = False, sums: bool = False) -> None:
        self._flow, self._intake = flow, intake
        pond = flow.pond
        self.start = pond.length
        self._clock, self._tokens, self._seen = replace(flow.clock), flow.tokens, flow._seen
        self._recent, self._text = pond._recent.copy(), pond._text
        self._standing, self._look = intake.at, intake._look.groups
        self._counts = list(pond.queries.counts)
        self._queries: Tensor | None = None
        self._sums: list[Tensor] = []
        self._open = True
        flow.open_step = self
        try:
            pond.ledger.hold("undo", pond.plan.undo_bytes)
            if queries and pond.plan.query_bytes:
                self._queries = pond.queries.rows.clone()
            if sums and pond.geometry.sums:
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
            flow, intake, pond = self._flow, self._intake, self._flow.pond
            pond.truncate(self.start)
            pond._recent, pond._text = self._recent.copy(), self._text
            if self._queries is not None:
                pond.queries.rows.copy_(self._queries)
                pond.queries.counts = list(self._counts)
            for live, saved in zip(_live_sums(pond, self.start) if self._sums else (), self._sums, strict=True):
                live.copy_(saved)
            flow.clock, flow.tokens, flow._seen = replace(self._clock), self._tokens, self._seen
            intake._look.groups, intake.at = self._look, self._standing
            self._open = False
        self._let_go()

    def _let_go(self) -> None:
        self._queries, self._sums = None, []
        self._flow.pond.ledger.hold("undo", 0)
        self._intake.book()
        self._flow.open_step = None


def _live_sums(pond: Pond, start: int) -> list[Tensor]:
    """Views of the sums of all tokens in front of slot `start` of the first layer, packed ones included."""
    found = []
    for layer, ahead in zip(pond.layers, pond._ahead, strict=True):
        found.append(layer.sums[:, : start + ahead])
        if isinstance(layer, TieredLayer) and layer.shelf.sums is not None:
            found.append(layer.shelf.sums[:, : layer.shelf.groups])
    return found
