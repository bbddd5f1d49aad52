"""What follows a compaction's choice: layers merge, hand over, pack and move what was chosen, and the books are set, as one `Move`.

Nothing here asks what to keep, and nothing fails for good but by want of memory: interrupted anywhere, a pass goes on where it
stopped. Knows the pond it works on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond.cache.tier import MixedPrecisionLayer
from millpond.memory.resumable import Lazy, Mask, Move, Steps
from millpond.policies.base import TEXT, Policy, View

if TYPE_CHECKING:
    from millpond.cache.host import Arrivals
    from millpond.cache.layer import PondLayer
    from millpond.cache.pond import Pond

__all__ = ["Chosen", "Compaction", "Forgetting"]


@dataclass(frozen=True)
class Chosen:
    """What stays in one layer.

    Attributes:
        keep: of the full tokens behind the prompt; None for all. stay: of the packed groups; None for all.
        carry: what the policy left in `View.carried_scores`, for its `merge`.
    """

    keep: Mask | None
    stay: Mask | None
    carried_scores: Tensor | None = None


class _Pass(ABC):
    """Steps for every layer that changes, and what follows them."""

    def __init__(self, pond: Pond) -> None:
        self._pond = pond
        self._steps = Steps([])
        self._before = pond.evicted + pond.memory_tokens

    def run(self) -> None:
        with self._pond.ledger.borrow("scratch", self._pond.plan.scratch_bytes):
            self._steps.run()

    @abstractmethod
    def _layer(self, index: int, chosen: Chosen) -> list[Callable[[], None]]:
        """A layer's steps, worked out when the layers before it are done."""

    def _layers(self, chosen: Sequence[Chosen | None]) -> list[Callable[[], None]]:
        return [Lazy(partial(self._layer, index, one)).run for index, one in enumerate(chosen) if one is not None]

    def _count(self) -> None:
        """Of the tokens that were evicted or in memory before, those that are not in memory now have been evicted."""
        self._pond.evicted = self._before - self._pond.memory_tokens


class Forgetting(_Pass):
    """Packed groups go, in every layer."""

    def __init__(self, pond: Pond, chosen: Sequence[Chosen | None]) -> None:
        super().__init__(pond)
        self._steps = Steps([*self._layers(chosen), self._count])

    def _layer(self, index: int, chosen: Chosen) -> list[Callable[[], None]]:
        layer = self._pond.layers[index]
        assert isinstance(layer, MixedPrecisionLayer)
        assert chosen.stay is not None
        return layer.quantized_store.dropping(chosen.stay.indices())


class Compaction(_Pass):
    """One pass.

    Args:
        chosen: for every layer; None for one that keeps all it has. capacities: each layer's slots in the arena afterwards.
        since, text: what was protected, see `Pond._protect`.
    """

    def __init__(
        self, pond: Pond, chosen: Sequence[Chosen | None], capacities: Sequence[int], since: int, text: int
    ) -> None:
        super().__init__(pond)
        self._since, self._text = since, text
        self._faults: list[str] = []  # of the policy, in merging
        self._arrivals: Arrivals | None = None
        steps = self._layers(chosen)
        if pond.host is not None:
            # Every layer and head keeps the same.
            layer, keep = pond.layers[0], next(one.keep for one in chosen if one is not None and one.keep is not None)
            leave = self._leave(layer, keep.indices()[0])
            self._arrivals = pond.host.arrange(layer.time_us[0].index_select(0, leave), pond.plan.group_tokens)
            grid_position, positions = (
                tensor[0].index_select(0, leave) for tensor in (layer.grid_position, layer.positions)
            )
            steps.insert(0, partial(pond.host.ensure_capacity, self._arrivals, grid_position, positions))
        lengths = [
            layer.length if one is None or one.keep is None else pond.plan.prompt_tokens + one.keep.kept
            for layer, one in zip(pond.layers, chosen, strict=True)
        ]
        if pond.arena:
            steps += pond.arena.cutting(capacities, lengths, pond.plan.chunk)
        books = {
            "_ahead": [length - lengths[0] for length in lengths],
            "compactions": pond.compactions + 1,
            # What was not protected is no longer whole in every head, and can never be protected again.
            "_recent": deque(group for group in pond._recent if group[0] >= since),
            # None where there was no text, so that nobody looks for any.
            "_text": None if pond._text is None else text,
        }
        steps += [partial(pond.__dict__.update, books), self._count]
        self._steps = Steps(steps)

    def _layer(self, index: int, chosen: Chosen) -> list[Callable[[], None]]:
        pond, layer = self._pond, self._pond.layers[index]
        assert chosen.keep is not None
        keep, start, chunk = chosen.keep.indices(), pond.plan.prompt_tokens, pond.plan.chunk
        steps: list[Callable[[], None]] = []
        if pond.policy.needs.merging:
            steps.append(_Merging(pond.policy, partial(self._view, index, chosen), keep, self._faults).run)
        if pond.host is not None and self._arrivals is not None:
            at_most = max(1, chunk // pond.geometry.kv_heads)
            steps.append(pond.host.storing(self._arrivals, index, layer, self._leave(layer, keep[0]), at_most))
        if isinstance(layer, MixedPrecisionLayer):
            stay = None if chosen.stay is None else chosen.stay.indices()
            return [*steps, *layer.quantization_steps(keep, stay, start, chunk)]
        return [*steps, *layer.compaction(keep, start, chunk)]

    def _view(self, index: int, chosen: Chosen) -> View:
        view = self._pond._view(index, self._pond.layers[index], self._since, self._text)
        return replace(view, carried_scores=chosen.carried_scores)

    def _leave(self, layer: PondLayer, keep: Tensor) -> Tensor:
        """Slots of the frame tokens that a layer forgets, int64 [m]; `keep`, int64 [S], is that of every head."""
        start = self._pond.plan.prompt_tokens
        gone = torch.ones(layer.length - start, dtype=torch.bool, device=self._pond.device)
        gone[keep] = False
        gone &= layer.grid_position[0, start : layer.length, 0] != TEXT
        return gone.nonzero()[:, 0].add_(start)


class _Merging:
    """A layer's merge, head by head: heads that have been changed are left out when it is run again.

    A policy that fails in it twice is not asked again in this pass, and what it had not changed by then stays as it was.

    Args:
        faults: what it failed with, in all layers.
    """

    def __init__(self, policy: Policy, view: Callable[[], View], keep: Tensor, faults: list[str]) -> None:
        self._policy, self._view, self._keep, self._faults = policy, view, keep, faults
        self._heads = 0  # that have been changed, or need not be
        self._change: tuple[int, Move] | None = None

    def run(self) -> None:
        self._finish()
        if len(self._faults) > 1:
            return
        try:
            self._policy.merge(replace(self._view(), change=self._take), self._keep)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # no fault of the policy's: it is asked again until there is memory
        except Exception as error:
            self._faults.append(str(error))
            if len(self._faults) < 2 or self._change is not None:
                raise

    def _take(self, head: int, how: Move) -> None:
        if head >= self._heads:
            self._change = head, how
            self._finish()

    def _finish(self) -> None:
        if self._change is not None:
            head, how = self._change
            how.run()
            self._heads = head + 1
            self._change = None
