"""Moving a storage to larger or smaller tensors while the stream runs, as one `Move` that can also be taken back.

Whether the new plan can be reached under the cap is known before anything moves. A machine that refuses memory on the way gets
the storage its old tensors back. One algorithm for every kind of storage, which says what its tensors are and what is done around
their exchange.
"""

from __future__ import annotations

import traceback
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from millpond.cache.plan import Plan
from millpond.cache.storage.base import Storage
from millpond.cache.storage.exchange import Exchange, Slab, feasible
from millpond.errors import BudgetError
from millpond.memory.ledger import Ledger
from millpond.memory.resumable import Steps


def most_tokens(storage: Storage, ledger: Ledger, old: Plan, new: Plan, limit: int | None) -> int:
    """The most tokens behind the prompt that can be kept on the way to fewer slots.

    As many as the new plan has slots for, or fewer, so that a tensor's live rows fit elsewhere while it is exchanged.

    Args:
        limit: the cap on the way in bytes.

    Raises:
        BudgetError: none.
    """
    start = new.prompt_tokens

    def too_many(tokens: int) -> bool:
        return not feasible(_slabs(storage, new, start + tokens), ledger.held - storage.buffer_bytes, limit)

    few = bisect_left(range(new.memory_tokens + 1), True, 1, key=too_many) - 1
    if few < 1:
        raise BudgetError(f"the pond cannot shrink to {new.slots} slots", minimum=old.budget)
    return few


def reachable(storage: Storage, ledger: Ledger, old: Plan, new: Plan, limit: int | None) -> Plan:
    """The new plan; or the same on the tensors that there are, where the step is too small to be worth a second copy of one, which
    does not fit under the cap.

    Raises:
        BudgetError: neither can be reached.
    """
    if feasible(_slabs(storage, new, _longest(storage)), ledger.held - storage.buffer_bytes, limit):
        return new
    plan = storage.unchanged(old, new) if new.slots > old.slots else None
    if plan is None:
        raise BudgetError(f"the pond cannot be moved to {new.slots} slots", minimum=old.budget)
    return plan


class Resizing:
    """To the new plan, which is `reachable`; or, once the machine has refused memory, back to the old one. A `Move`.

    Args:
        adopt: what is left to do when the storage is that of a plan.

    Attributes:
        refused: why it went back.
    """

    def __init__(
        self, storage: Storage, ledger: Ledger, old: Plan, new: Plan, limit: int | None, adopt: Callable[[Plan], None]
    ) -> None:
        self.refused: BudgetError | None = None
        slabs = _slabs(storage, new, _longest(storage))
        exchange = Exchange(slabs, ledger, limit, lambda: storage.nbytes)
        around = storage.relocation(old, new, bool(slabs))
        # A step like the others: a move that is complete must not cap anything again.
        capped = partial(ledger.move, limit)
        self._before = Steps([capped, *around.before])
        self._forth = Steps([*around.clear, exchange.forth, *around.forth, partial(adopt, new)])
        self._back = Steps([capped, *around.clear, exchange.back, *around.back, partial(adopt, old)])

    def run(self) -> None:
        self._before.run()
        if self.refused is None:
            try:
                self._forth.run()
                return
            except BudgetError as error:
                traceback.clear_frames(error.__traceback__)
                self.refused = error
        self._back.run()


def _longest(storage: Storage) -> int:
    return max(layer.length for layer in storage.layers)


def _slabs(storage: Storage, plan: Plan, length: int) -> list[Slab]:
    """Every tensor that changes its size, in the order of the exchange, for `length` live slots on average over the layers."""
    # What becomes smaller goes first, the largest in front; of what becomes larger the small ones, while there is most room.
    slabs = sorted(storage.resized(plan, length), key=lambda slab: slab.nbytes(slab.new) - slab.nbytes(slab.old))
    return [slab for slab in slabs if slab.new != slab.old]
