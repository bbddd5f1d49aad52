"""A turn's slots behind the memory, beside those of the stream that goes on: the two take turns in the place where attention looks.

Attention sees one run of slots from the first on, and neither may see the other. So whoever does not run is parked at the far end,
in reverse: turning the slots behind the memory around brings the one to the front and parks the other, and needs no slots to spare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Storage
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Steps, Transactional


@dataclass(frozen=True)
class TurnSlots:
    """Where a turn lies. Replaced as a whole.

    Attributes:
        start: slot of the first layer where the memory ended when it was asked; what comes behind is the turn's, or newer.
        claim: slots that are the turn's, whether it has used them yet or not.
        in_front: whether the turn can run; otherwise the stream can.
        parked: tokens of the other.
    """

    start: int
    claim: int
    in_front: bool = True
    parked: int = 0


class TurningAround:
    """Brings the one that is parked to the front. A `Move`.

    Args:
        slots: as they are. scratch: bytes of the ledger's account to work with. adopt: takes what they are afterwards.
    """

    def __init__(
        self, storage: Storage, ledger: Ledger, slots: TurnSlots, scratch: int, adopt: Callable[[TurnSlots], None]
    ) -> None:
        self._ledger, self._scratch = ledger, scratch
        live = storage.length - slots.start
        around = storage.turning_around(slots.start, max(live, slots.parked), scratch)
        lengths = storage.setting_length(slots.start + slots.parked)
        after = replace(slots, in_front=not slots.in_front, parked=live)
        self._steps = Steps([*around, *lengths, partial(adopt, after)])

    def run(self) -> None:
        with self._ledger.borrow("scratch", self._scratch):
            self._steps.run()


class TakingTurns(Transactional):
    """Base of a memory behind which a turn can run while its stream goes on.

    Attributes:
        storage, ledger, plan: as in `millpond.cache.pond.Pond`.
        turn: that runs; None while none does. What touches the memory as a whole waits until it has ended.
    """

    storage: Storage
    ledger: Ledger
    plan: Plan

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn: TurnSlots | None = None

    @property
    def length(self) -> int:
        """Live slots of the first layer; between forwards the same in every layer, but for a policy with layer budgets."""
        return self.storage.length

    @property
    def free(self) -> int:
        """Slots that the next forward can append to, in the layer that has fewest."""
        if self.turn is None:
            return self.storage.free
        if self.turn.in_front:
            return self.turn.claim - (self.length - self.turn.start)
        return self.storage.free - self.turn.claim

    @property
    def stream_length(self) -> int:
        """Live slots of the first layer without those of a turn that has its own."""
        turn = self.turn
        return turn.start + turn.parked if turn is not None and turn.in_front else self.length

    @property
    def stream_free(self) -> int:
        """Slots that the stream does not use, in the layer that has fewest; a turn that runs may."""
        return self.storage.free + self.length - self.stream_length

    def begin_turn(self) -> None:
        """Give a turn slots of its own behind the memory: all that are free, until `claim_turn` says how many it needs."""
        self.expect_no_turn()
        self.turn = TurnSlots(self.length, self.free)

    def claim_turn(self, tokens: int) -> None:
        """Leave the running turn, which is in front, slots for `tokens` more tokens, or as many as there are; the stream gets the rest."""
        self.finish()
        assert self.turn is not None
        self.turn = replace(self.turn, claim=min(self.turn.claim, self.length - self.turn.start + tokens))

    def fits_beside_turn(self, tokens: int) -> bool:
        """Whether the stream can take a block of `tokens` tokens without what a running turn has claimed."""
        return self.turn is None or tokens + self.turn.claim <= self.stream_free

    def bring_turn(self) -> None:
        """Let the next forward be one of the turn that runs."""
        self._bring(in_front=True)

    def bring_stream(self) -> None:
        """Let the next forward be one of the stream."""
        self._bring(in_front=False)

    def _bring(self, *, in_front: bool) -> None:
        self.finish()
        if self.turn is not None and self.turn.in_front != in_front:
            parts = self.storage, self.ledger, self.turn, self.plan.scratch_bytes
            self.carry_out(TurningAround(*parts, self._set_turn))

    def end_turn(self) -> None:
        """Forget the turn that runs, if one does: the stream is what it would be without. Can be repeated."""
        self.finish()
        if self.turn is not None and self.turn.parked:
            self.bring_stream()
        if self.turn is not None:
            lengths = self.storage.setting_length(self.turn.start) if self.turn.in_front else []
            self.carry_out(Steps([*lengths, partial(self._set_turn, None)]))

    def _set_turn(self, turn: TurnSlots | None) -> None:
        self.turn = turn

    def expect_no_turn(self) -> None:
        """In front of what touches the memory as a whole; whoever calls that has waited for the turn to end."""
        self.finish()
        assert self.turn is None, "a turn is running"
