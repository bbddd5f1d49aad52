"""The contract of a policy: what survives when the memory is at its cap.

A policy looks at one layer at a time through a `View` and returns which slots to keep. It only selects; the cache moves
the bytes, so no policy can breach the cap. A policy never sees models, files, tokenizers or questions, and never the
pinned prompt, which therefore survives whatever a policy does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from millpond import ops
from millpond.errors import PolicyError
from millpond.memory.resumable import Move
from millpond.positions.grid import SEPARATOR, TEXT

if TYPE_CHECKING:
    from millpond.kv_quantization.tier import QuantizedTier
    from millpond.positions import Rope

__all__ = ["LAYER_SHARE", "SEPARATOR", "TEXT", "Needs", "Policy", "Scorer", "Shape", "View"]
__all__ += ["check_between", "check_whole", "keep_top", "selection_scratch"]

LAYER_SHARE = 2.0
"""`Needs.layer_share` of the policies here that have layer budgets. Ours: it bounds the scratch of a compaction."""


@dataclass(frozen=True, eq=False)
class View:
    """One layer's memory behind the pinned prompt, oldest first: n tokens in each of H KV heads.

    Every tensor is a view of the cache's own storage (read-only by contract) except `protected`. After the first
    compaction the heads hold different tokens, so times and grid positions are per head.

    Attributes:
        keys: [H, n, D] as stored, rotary embedding applied.
        values: [H, n, D].
        time_us: int64 [H, n], stream time of the token's frame group in microseconds, ascending. Tokens of one group, and
            only those, share a time; a remembered turn carries the time at which it was said.
        grid_position: int16 [H, n, 2], row and column on the frame's merged grid; `TEXT` or `SEPARATOR` for tokens without one.
        protected: bool [H, n], tokens that must be kept (the latest frames, recent text). Every head has equally many.
        layer, layers: index of this layer and number of layers.
        block: tokens of one frame group as they arrived last.
        chunk: tokens of one head that may be worked on at once where an intermediate [n, D] is needed; keeps the
            scratch of a compaction bounded.
        queries: [H, g, w, D], the proxy's queries, grouped by KV head, rotary embedding applied at their own positions; None
            unless the policy needs a `proxy`.
        prompt_keys: [H, P, D], the pinned prompt's keys, which share the softmax with the memory's; with `queries`.
        accumulated_attention: float32 [H, n], attention that the token received from all stream tokens after it, summed over queries and the
            group's heads; None unless the policy needs `accumulated_attention`.
        deeper_scores: float32 [H, n], what the policy left in `carried_scores` at the next deeper layer for the same token of the
            same head. NaN where that layer did not hold it, and for tokens on no grid, which cannot be told apart. None unless the
            policy needs `deeper_scores`; None too at the deepest layer, after a layer that keeps all it has and was not asked, and
            where quantized tokens are chosen from.
        carried_scores: float32 [H, n], to be written: what the policy leaves for the next shallower layer; NaN where it leaves
            nothing. None unless the policy needs `deeper_scores`, and where quantized tokens are chosen from.
        change: what carries `millpond.policies.scoring.merging.change` out in the cache; None: it is run at once.
        positions: int32 [H, n, axes], at which each key is rotated; None unless the policy needs `positions`.
        rope: the rotary embedding, to rerotate keys to another position; None unless the policy needs `positions`, and outside a session.
    """

    keys: Tensor
    values: Tensor
    time_us: Tensor
    grid_position: Tensor
    protected: Tensor
    layer: int
    layers: int
    block: int
    chunk: int
    queries: Tensor | None = None
    prompt_keys: Tensor | None = None
    accumulated_attention: Tensor | None = None
    deeper_scores: Tensor | None = None
    carried_scores: Tensor | None = None
    change: Callable[[int, Move], None] | None = None
    positions: Tensor | None = None
    rope: Rope | None = None

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class Needs:
    """What a policy needs from the cache beside keys, values, times and grid positions; see `millpond.policies.composition`.

    Attributes:
        proxy: whose queries `View.queries` shows: those of the latest stream tokens that ran (never a question's), or those of the chat
            template's own tokens behind the video, run for each compaction and taken back; None for nobody's.
        queries: the most tokens whose queries are kept for the proxy "latest"; charged to the cap.
        accumulated_attention: the cache sums up the attention that every token receives (`View.accumulated_attention`); 4 bytes a head and slot.
        deeper_scores: a compaction asks from the deepest layer up, and each layer sees what the policy left at the next deeper one
            (`View.deeper_scores`, `View.carried_scores`).
        merging: `Policy.merge` changes what stays.
        positions: `View.positions` and `View.rope`, to rerotate keys.
        whole_frames: `slots` must be a multiple of `View.block`; the plan rounds the memory down to it.
        retrieved_frames: frame groups that a question retrieves from host memory, to which what is not kept then goes. Above 0, `keep`
            must choose the same tokens in every head of every layer, and forget frames in stream order.
        quantized_tier: where tokens go that `keep` leaves out: into few bits, from which `keep` chooses again; None: they are forgotten.
        layer_share: the most that one layer may keep, in units of the layers' mean; 1 when all layers keep equally many. Above 1,
            `Policy.layer_weights` says in what proportion they share the memory.
    """

    proxy: Literal["latest", "prompt"] | None = None
    queries: int = 0
    accumulated_attention: bool = False
    deeper_scores: bool = False
    merging: bool = False
    positions: bool = False
    whole_frames: bool = False
    retrieved_frames: int = 0
    quantized_tier: QuantizedTier | None = None
    layer_share: float = 1.0


_NOTHING = Needs()


@dataclass(frozen=True)
class Shape:
    """The largest view that a policy is shown, for bounds of what it allocates.

    Attributes:
        heads, tokens, head_dim: H, n and D. block, chunk: as in `View`.
    """

    heads: int
    tokens: int
    head_dim: int
    block: int
    chunk: int

    def of_all(self, *dtypes: torch.dtype) -> int:
        """Bytes of one [H, n] tensor of each dtype."""
        return self.heads * self.of_head(*dtypes)

    def of_head(self, *dtypes: torch.dtype) -> int:
        """Bytes of one [n] tensor of each dtype."""
        return self.tokens * sum(dtype.itemsize for dtype in dtypes)


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies: a frozen dataclass whose fields are the method's parameters with its published defaults."""

    name: ClassVar[str]
    """The name on the command line and in tables."""
    source: ClassVar[str]
    """The publication, and what of it was read."""
    agnostic: ClassVar[bool] = True
    """True when no question can reach the selection."""
    capped: ClassVar[bool] = True
    """False for the reference that keeps everything and ignores the budget."""

    @property
    def needs(self) -> Needs:
        """What the cache must show the policy and do for it; a class attribute where no parameter changes it."""
        return _NOTHING

    @abstractmethod
    def keep(self, view: View, slots: int) -> Tensor:
        """Choose `slots` of the view's tokens in every head (slots < view.tokens).

        Returns:
            int64 [H, slots], strictly ascending in each row, all protected tokens among them.
        """

    def merge(self, view: View, keep: Tensor) -> None:  # noqa: B027  # nothing is merged, unless a policy says so
        """Fold what is about to be forgotten into what stays: rewrite keys and values of kept, unprotected tokens.

        Called with what `keep` returned, when all layers have chosen and before this one moves; `View.carried_scores` is what `keep` left. It is
        called again when it was interrupted. So it writes nothing itself but has `millpond.policies.scoring.merging.fold` or `change` do
        it, at most once a head, from the first head on, and what it does in a head depends on nothing but that head.
        """

    def minimum_memory(self, block: int) -> int:
        """The fewest tokens, in whole groups of `block`, that must be remembered for `keep` to work when one more group comes."""
        return block

    def recent(self, frames: int) -> int:
        """How many of the latest frame groups are protected, of the `frames` groups that the memory holds; at least 1."""
        return 1

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        """In what proportion the layers share the memory, asked before each compaction of a policy that needs a `layer_share` above 1.

        `views` gives one layer at a time, in order. The cache turns the weights into whole numbers whose sum is exact, within
        `layer_share` and with what is protected in each layer.
        """
        return [1.0 for _ in views]

    def scratch(self, shape: Shape) -> int:
        """Upper bound in bytes of what `keep` and `merge` allocate at any instant, `keep`'s result included; charged to the cap.

        A sum of parts: what `keep_top` takes, which is this one, and what the policy's scores take, whose bounds stand beside the
        functions in `millpond.policies.scoring`.
        """
        return selection_scratch(shape)


@dataclass(frozen=True)
class Scorer(Policy):
    """A policy that gives every token a score and keeps the best."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """How much each token is worth keeping: a new tensor, float32 [H, n], which the selection overwrites."""

    def protected(self, view: View, slots: int) -> Tensor:
        """The tokens that stay whatever their score, of which `slots` fit: bool [H, n], the view's own among them."""
        return view.protected

    def keep(self, view: View, slots: int) -> Tensor:
        return keep_top(self.score(view), self.protected(view, slots), slots)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def check_between(policy: _Named, low: float, high: float, *fields: str) -> None:
    """Hold parameters of a policy to low <= value <= high.

    Raises:
        PolicyError: one lies outside; names it.
    """
    for field in fields:
        if not low <= getattr(policy, field) <= high:
            raise PolicyError(f"{policy.name}: {field} must lie between {low} and {high}, not {getattr(policy, field)}")


def check_whole(policy: _Named, minimum: int, *fields: str) -> None:
    """Hold parameters of a policy or an allocator to whole numbers from `minimum` on.

    Raises:
        PolicyError: one is none; names it.
    """
    for field in fields:
        value = getattr(policy, field)
        if not isinstance(value, int) or value < minimum:
            raise PolicyError(f"{policy.name}: {field} must be a whole number, at least {minimum}, not {value!r}")


def selection_scratch(shape: Shape) -> int:
    """The most bytes that float32 scores and `keep_top` take: scores, result, and the ranking of one head."""
    return shape.of_all(torch.float32, torch.int64) + 4 * shape.of_head(torch.int64)


def keep_top(scores: Tensor, protected: Tensor, slots: int) -> Tensor:
    """The protected tokens and the best of the others, in stream order; of equals the older one stays.

    Protection is a mask that is applied to the ranking, never a large score: in bfloat16 `max + 1` is no protection. A score
    that is not a number ranks last, an infinite one below protection.

    Args:
        scores: float [H, n]; overwritten.
        protected: bool [H, n].
        slots: how many to keep in each head, at least the number protected.

    Returns:
        int64 [H, slots], ascending.

    Raises:
        PolicyError: `slots` is not between 1 and n.
    """
    if not 0 < slots <= scores.shape[1]:
        raise PolicyError(f"cannot keep {slots} of {scores.shape[1]} tokens")
    return ops.best_and_protected(scores, protected, slots)
