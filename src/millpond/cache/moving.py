"""What follows a compaction's choice, as one `Move`: layers merge, offload, quantize and move what was chosen, and the pass is counted.

Nothing here asks what to keep, and nothing fails for good but for lack of memory: interrupted anywhere, a pass goes on where it
stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from millpond.cache.arrivals import Arrivals
from millpond.cache.compaction_state import CompactionState
from millpond.cache.recent import Protected
from millpond.cache.storage.layer import PondLayer
from millpond.memory.resumable import Mask, Move, Step, Steps
from millpond.policies.base import TEXT, Policy, View


@dataclass(frozen=True, eq=False)
class Chosen:
    """What stays in one layer.

    Attributes:
        keep: of the full tokens behind the prompt; None for all. stay: of the quantized groups; None for all.
        carried_scores: what the policy left in `View.carried_scores`, for its `merge`.
    """

    keep: Mask | None
    stay: Mask | None
    carried_scores: Tensor | None = None


class _Pass(ABC):
    """Steps for every layer that changes, and what follows them."""

    def __init__(self, at: CompactionState) -> None:
        self._at = at
        self._steps = Steps([])

    def run(self) -> None:
        with self._at.ledger.borrow("scratch", self._at.plan.scratch_bytes):
            self._steps.run()

    @abstractmethod
    def _layer(self, index: int, chosen: Chosen) -> list[Step]:
        """A layer's steps, worked out when the layers before it are done."""

    def _layers(self, chosen: Sequence[Chosen | None]) -> list[Step]:
        return [Steps(partial(self._layer, index, one)).run for index, one in enumerate(chosen) if one is not None]


class Forgetting(_Pass):
    """Quantized groups go, in every layer."""

    def __init__(self, at: CompactionState, chosen: Sequence[Chosen | None]) -> None:
        super().__init__(at)
        self._steps = Steps([*self._layers(chosen), partial(at.count_pass, at.recent)])

    def _layer(self, index: int, chosen: Chosen) -> list[Step]:
        assert chosen.stay is not None
        return self._at.storage.dropping(index, chosen.stay.indices())


class Compaction(_Pass):
    """One pass.

    Args:
        chosen: for every layer; None for one that keeps all it has. protected: what had to be among it.
        free: slots that are not in use afterwards, on average over the layers.
    """

    def __init__(self, at: CompactionState, chosen: Sequence[Chosen | None], protected: Protected, free: int) -> None:
        super().__init__(at)
        self._protected = protected
        self._faults: list[str] = []  # of the policy, in merging
        self._arrivals: Arrivals | None = None
        steps, layers = self._layers(chosen), at.storage.layers
        if at.host is not None:
            # Every layer and head keeps the same.
            layer, keep = layers[0], next(one.keep for one in chosen if one is not None and one.keep is not None)
            leave = self._leave(layer, keep.indices()[0])
            self._arrivals = at.host.arrange(layer.time_us[0].index_select(0, leave), at.plan.group_tokens)
            metadata = (tensor[0].index_select(0, leave) for tensor in (layer.grid_position, layer.positions))
            steps.insert(0, partial(at.host.register, self._arrivals, *metadata))
        lengths = [
            layer.length if one is None or one.keep is None else at.plan.prompt_tokens + one.keep.kept
            for layer, one in zip(layers, chosen, strict=True)
        ]
        steps += at.storage.finishing(lengths, free, at.plan.chunk)
        self._steps = Steps([*steps, partial(at.count_pass, at.recent.compacted(protected))])

    def _layer(self, index: int, chosen: Chosen) -> list[Step]:
        at, layer = self._at, self._at.storage.layers[index]
        assert chosen.keep is not None
        keep, start, chunk = chosen.keep.indices(), at.plan.prompt_tokens, at.plan.chunk
        steps: list[Step] = []
        if at.policy.needs.merging:
            steps.append(_Merging(at.policy, partial(self._view, index, chosen), keep, self._faults).run)
        if at.host is not None and self._arrivals is not None:
            at_most = max(1, chunk // len(keep))
            steps.append(at.host.offloading(self._arrivals, index, layer, self._leave(layer, keep[0]), at_most))
        stay = None if chosen.stay is None else chosen.stay.indices()
        return [*steps, *at.storage.compaction(index, keep, stay, start, chunk)]

    def _view(self, index: int, chosen: Chosen) -> View:
        return replace(self._at.view(index, self._protected), carried_scores=chosen.carried_scores)

    def _leave(self, layer: PondLayer, keep: Tensor) -> Tensor:
        """Slots of the frame tokens that a layer forgets, int64 [m]; `keep`, int64 [S], is that of every head."""
        start = self._at.plan.prompt_tokens
        gone = torch.ones(layer.length - start, dtype=torch.bool, device=layer.device)
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
