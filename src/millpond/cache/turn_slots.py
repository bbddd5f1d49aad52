"""A turn's slots behind the memory, beside those of the stream that goes on: the two take turns in the place where attention looks.

Attention sees one run of slots from the first on, and neither may see the other. So whoever does not run is parked at the far end,
in reverse: turning the slots behind the memory around brings the one to the front and parks the other, and needs no slots to spare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from millpond.cache.storage.base import Storage
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Step, Steps


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


def forgetting(storage: Storage, slots: TurnSlots, adopt: Callable[[None], None]) -> list[Step]:
    """The steps that forget a turn, which is in front only where nothing is parked."""
    return [*(storage.setting_length(slots.start) if slots.in_front else []), partial(adopt, None)]
