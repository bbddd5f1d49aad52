"""Moving a pond into larger or smaller storage while the stream runs, as one `Move` that can also be taken back.

What the new plan wants is compared with what the cap has room for before anything moves. A machine that refuses memory on the way gets
the pond its old storage back. With a low-bit tier the dequantization buffer, which holds nothing between forwards, is given back first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from millpond.cache.storage import Exchange, Slab, feasible
from millpond.cache.tier import MixedPrecisionLayer
from millpond.errors import BudgetError
from millpond.memory.resumable import Steps

if TYPE_CHECKING:
    from millpond.cache.arena import Arena
    from millpond.cache.pond import Pond
    from millpond.memory.plan import Plan

__all__ = ["resize_pond"]

_VECTORS = ("keys", "values")
_METADATA = ("time_us", "grid_position", "positions", "accumulated_attention")


def resize_pond(pond: Pond, plan: Plan) -> None:
    """See `Pond.resize`."""
    pond.finish()
    old = pond.plan
    limit = max(old.budget or 0, plan.budget or 0) if pond.policy.capped else None
    groups = 0
    if pond.dequantization_buffer is not None:
        groups = plan.quantized_tokens // pond.dequantization_buffer.tier.quantizer.group
    if plan.slots < old.slots:
        _shrink(pond, plan, groups, limit)
    if pond.dequantization_buffer is not None:
        pond.forget_quantized(groups)
    longest = max(layer.length for layer in pond.layers)
    if not feasible(_slabs(pond, plan, longest, groups), _held(pond), limit):
        if plan.slots <= old.slots or pond.dequantization_buffer is not None:
            raise BudgetError(f"the pond cannot be moved to {plan.slots} slots", minimum=old.budget)
        # Too small a step to be worth a second copy of a tensor, which the cap has no room for: keep the storage.
        plan = plan.with_slots(old.slots)
    move = _Resizing(pond, plan, _slabs(pond, plan, longest, groups), limit)
    pond.carry_out(move)
    if move.refused is not None:
        raise move.refused


def _shrink(pond: Pond, plan: Plan, groups: int, limit: int | None) -> None:
    """Forget as much as the new plan has no slots for, and as much more as must go for a tensor's live rows to fit elsewhere."""
    start = plan.prompt_tokens
    target = min(plan.memory_tokens, plan.slots - plan.reserve_tokens - start)
    few, most = 0, target  # the most for which the move is feasible
    while few < most:
        middle = (few + most + 1) // 2
        if feasible(_slabs(pond, plan, start + middle, groups), _held(pond), limit):
            few = middle
        else:
            most = middle - 1
    if few < 1:
        raise BudgetError(f"the pond cannot shrink to {plan.slots} slots", minimum=pond.plan.budget)
    pond.compact(few)


def _held(pond: Pond) -> int:
    """Bytes of the cap that are taken while storage is exchanged."""
    return pond.ledger.held - pond.ledger.account("dequantization_buffer")


def _slabs(pond: Pond, plan: Plan, length: int, groups: int) -> list[Slab]:
    """Every tensor that changes its size, in the order of the exchange, for `length` live slots on average over the layers."""
    slabs: list[Slab] = []
    if pond.arena is not None:
        live = min(pond.arena.slots, sum(layer.length for layer in pond.layers), length * len(pond.layers))
        slabs = [_flat(pond.arena, kind, plan.slots * len(pond.layers), live) for kind in pond.arena.kinds]
    else:
        for layer in pond.layers:
            for name in (*_VECTORS, *_METADATA):
                if getattr(layer, name) is not None:
                    slabs.append(_own(layer, name, plan.slots, min(length, layer.length), name in _VECTORS))
            if isinstance(layer, MixedPrecisionLayer):
                quantized_store = layer.quantized_store
                for name in quantized_store.NAMES:
                    if getattr(quantized_store, name) is not None:
                        slabs.append(_own(quantized_store, name, groups, min(groups, quantized_store.groups), False))
    # What becomes smaller goes first, the largest in front; of what becomes larger the small ones, while there is most room.
    slabs.sort(key=lambda slab: slab.nbytes(slab.new) - slab.nbytes(slab.old))
    return [slab for slab in slabs if slab.new != slab.old]


def _own(holder: Any, name: str, new: int, live: int, batched: bool) -> Slab:
    """A tensor of a layer or shelf, [H, n, ...], or [1, H, n, ...] when `batched`."""

    def get() -> Tensor:
        tensor: Tensor = getattr(holder, name)
        return tensor[0] if batched else tensor

    def put(tensor: Tensor) -> None:
        setattr(holder, name, tensor[None] if batched else tensor)

    return _slab(get, put, get().shape[1], new, live)


def _flat(arena: Arena, kind: str, slots: int, live: int) -> Slab:
    """One kind of an arena's storage, which has its heads one behind the other: [1, n x H, ...]."""
    heads = len(arena.flat(kind)) // arena.slots
    return _slab(
        lambda: arena.flat(kind)[None],
        lambda tensor: arena.replace(kind, tensor[0]),
        arena.slots * heads,
        slots * heads,
        live * heads,
    )


def _slab(get: Callable[[], Tensor], put: Callable[[Tensor], None], old: int, new: int, live: int) -> Slab:
    like = get()
    return Slab(get, put, tuple(like.shape[2:]), like.dtype, like.device, like.shape[0], old, new, live)


class _Resizing:
    """To the new plan; or, once the machine has refused memory, back to the old one. A `Move`.

    Attributes:
        refused: why it went back.
    """

    def __init__(self, pond: Pond, plan: Plan, slabs: Sequence[Slab], limit: int | None) -> None:
        self.refused: BudgetError | None = None
        self._pond = pond
        exchange = Exchange(slabs, pond.ledger, limit, lambda: pond.nbytes)
        arena, dequantization_buffer = pond.arena if slabs else None, pond.dequantization_buffer
        clear: list[Callable[[], None]] = [] if dequantization_buffer is None else [dequantization_buffer.clear]
        # A step like the others: a move that is complete must not cap anything again.
        capped = partial(pond.ledger.move, limit)
        forth: list[Callable[[], None]] = [*clear, exchange.forth]
        back: list[Callable[[], None]] = [capped, *clear, exchange.back]
        self._pack = Steps([capped])
        if arena is not None:
            chunk, lengths = pond.plan.chunk, [layer.length for layer in pond.layers]
            headroom = (plan.slots * len(lengths) - sum(lengths)) // len(lengths)
            self._pack = Steps([capped, self._with_scratch(pond.plan, arena.packing(chunk)).run])
            forth.append(
                self._with_scratch(plan, arena.unpacking([length + headroom for length in lengths], chunk)).run
            )
            back.append(self._with_scratch(pond.plan, arena.unpacking(arena.capacities, chunk)).run)
        if dequantization_buffer is not None:
            forth.append(partial(dequantization_buffer.allocate, plan))
            back.append(partial(dequantization_buffer.allocate, pond.plan))
        self._forth = Steps([*forth, partial(self._settle, plan)])
        self._back = Steps([*back, partial(self._settle, pond.plan)])

    def run(self) -> None:
        self._pack.run()
        if self.refused is None:
            try:
                self._forth.run()
                return
            except BudgetError as error:
                traceback.clear_frames(error.__traceback__)
                self.refused = error
        self._back.run()

    def _with_scratch(self, plan: Plan, moves: Sequence[Callable[[], None]]) -> Steps:
        """An arena's moves, with the scratch of a plan that leaves room for it."""
        steps = Steps(moves)

        def run() -> None:
            with self._pond.ledger.borrow("scratch", plan.scratch_bytes):
                steps.run()

        return Steps([run])

    def _settle(self, plan: Plan) -> None:
        self._pond.plan = plan
        self._pond.ledger.settle(plan.budget if self._pond.policy.capped else None, plan.lines)
