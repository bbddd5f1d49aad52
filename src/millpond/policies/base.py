"""The contract of a policy: what survives when the memory is at its cap.

A policy looks at one layer at a time through a `View` and returns which slots to keep. It only selects; the cache moves
the bytes, so no policy can breach the cap. A policy never sees models, files, tokenizers or questions, and never the
pinned prompt, which therefore survives whatever a policy does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from millpond import native
from millpond.errors import PolicyError
from millpond.memory.resumable import Move

if TYPE_CHECKING:
    from millpond.cache.tier import Tier
    from millpond.positions import Rope

__all__ = ["LAYER_SHARE", "SEPARATOR", "TEXT", "Policy", "View", "check_between", "keep_top"]

TEXT = -1
"""`View.grid_position` row and column of a token of a remembered turn."""
SEPARATOR = -2
"""`View.grid_position` row and column of a frame's token that lies on no grid (a timestamp, a newline)."""
LAYER_SHARE = 2.0
"""`Policy.layer_share` of the policies here that have layer budgets. Ours: it bounds the scratch of a compaction."""


@dataclass(frozen=True, eq=False)
class View:
    """One layer's memory behind the pinned prompt, oldest first: n tokens in each of H KV heads.

    Every tensor is a view of the cache's own storage (read-only by contract) except `protected`. After the first
    compaction the heads hold different tokens, so times and places are per head.

    Attributes:
        keys: [H, n, D] as stored, rotary embedding applied.
        values: [H, n, D].
        time_us: int64 [H, n], stream time of the token's frame group in microseconds, ascending. Tokens of one group, and
            only those, share a time; a remembered turn carries the time at which it was said.
        place: int16 [H, n, 2], row and column on the frame's merged grid; `TEXT` or `SEPARATOR` for tokens without one.
        protected: bool [H, n], tokens that must be kept (the latest frames, recent text). Every head has equally many.
        layer, layers: index of this layer and number of layers.
        block: tokens of one frame group as they arrived last.
        chunk: tokens of one head that may be worked on at once where an intermediate of width D is needed; keeps the
            scratch of a compaction bounded.
        queries: [H, g, w, D], the proxy's queries, grouped by KV head, rotary embedding applied at their own positions; None
            unless the policy declares a `proxy`.
        prompt_keys: [H, P, D], the pinned prompt's keys, which share the softmax with the memory's; with `queries`.
        sums: float32 [H, n], attention that the token received from all stream tokens after it, summed over queries and the
            group's heads; None unless the policy declares `accumulated_attention`.
        deeper: float32 [H, n], what the policy left in `carried_scores` at the next deeper layer for the same token of the same head. NaN
            where that layer did not hold it, and for tokens without a place, which cannot be told apart. None unless the policy
            is `deepest_first`; None too at the deepest layer, beside a layer that keeps all it has and was not asked, and where
            packed tokens are chosen from.
        carry: float32 [H, n], to be written: what the policy leaves for the next shallower layer; NaN where it leaves nothing.
            None unless the policy is `deepest_first`, and where packed tokens are chosen from.
        change: what carries `millpond.policies.merging.change` out in the cache; None: it is run at once.
        positions: int32 [H, n, axes], at which each key is rotated; None where packed tokens are chosen from.
        rope: the rotary embedding, to turn keys to another position; None outside a session.
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
    whole_frames: ClassVar[bool] = False
    """True when `slots` must be a multiple of `View.block`; the plan rounds the memory down to it."""
    proxy: ClassVar[Literal["latest", "prompt"] | None] = None
    """Whose queries `View.queries` shows: those of the latest stream tokens that ran (never a question's), or those of the chat
    template's own tokens behind the video, run for each compaction and taken back; None for nobody's."""
    merges: ClassVar[bool] = False
    """True when `merge` changes what stays."""
    accumulated_attention: ClassVar[bool] = False
    """True when the cache must sum up the attention that every token receives (`View.accumulated_attention`); 4 bytes a head and slot."""
    deepest_first: ClassVar[bool] = False
    """True when a compaction asks from the deepest layer up and each layer sees what the policy left at the next deeper one
    (`View.deeper_scores`, `View.carried_scores`)."""

    @abstractmethod
    def keep(self, view: View, slots: int) -> Tensor:
        """Choose `slots` of the view's tokens in every head (slots < view.tokens).

        Returns:
            int64 [H, slots], strictly ascending in each row, all protected tokens among them.
        """

    def merge(self, view: View, keep: Tensor) -> None:  # noqa: B027  # nothing is merged, unless a policy says so
        """Fold what is about to be forgotten into what stays: rewrite keys and values of kept, unprotected tokens.

        Called with what `keep` returned, when all layers have chosen and before this one moves; `View.carried_scores` is what `keep` left. It is
        called again when it was interrupted. So it writes nothing itself but has `millpond.policies.merging.fold` or `change` do it,
        at most once a head, from the first head on, and what it does in a head depends on nothing but that head.
        """

    def minimum_memory(self, block: int) -> int:
        """The fewest tokens, in whole groups of `block`, that must be remembered for `keep` to work when one more group comes."""
        return block

    def recent(self, frames: int) -> int:
        """How many of the latest frame groups are protected, of the `frames` groups that the memory holds; at least 1."""
        return 1

    @property
    def queries(self) -> int:
        """The most tokens whose queries are kept for the proxy "latest"; charged to the cap."""
        return 0

    @property
    def tier(self) -> Tier | None:
        """Where tokens go that `keep` leaves out: into few bits, from which `keep` chooses again; None: they are forgotten."""
        return None

    @property
    def retrieved_frames(self) -> int:
        """Frame groups that a question recalls from host memory, to which what is not kept then goes. Above 0, `keep` must choose
        the same tokens in every head of every layer, and forget frames in stream order."""
        return 0

    @property
    def layer_share(self) -> float:
        """The most that one layer may keep, in units of the layers' mean; 1 when all layers keep equally many."""
        return 1.0

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        """In what proportion the layers share the memory, asked before each compaction when `layer_share` is above 1.

        `views` gives one layer at a time, in order. The cache turns the weights into whole numbers whose sum is exact, within
        `layer_share` and with room for what is protected in each layer.
        """
        return [1.0 for _ in views]

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        """Upper bound in bytes of what `keep` and `merge` allocate at any instant, `keep`'s result included; charged to the cap.

        Args:
            heads, tokens, head_dim: of the largest view. block, chunk: as in `View`.
        """
        # [H, n]: scores (float32) and the result (int64); one head's ranking (float32 and int64 [n], twice).
        return heads * tokens * (4 + 8) + 32 * tokens


def check_between(policy: Policy, low: float, high: float, *fields: str) -> None:
    """Hold parameters of a policy to low <= value <= high.

    Raises:
        PolicyError: one lies outside; names it.
    """
    for field in fields:
        if not low <= getattr(policy, field) <= high:
            raise PolicyError(f"{policy.name}: {field} must lie between {low} and {high}, not {getattr(policy, field)}")


def keep_top(scores: Tensor, protected: Tensor, slots: int) -> Tensor:
    """The protected tokens and the best of the others, in stream order; of equals the older one stays.

    Protection is a mask that is applied to the ranking, never a large score: in bfloat16 `max + 1` is no protection. A score
    that is not a number counts as the least, an infinite one for less than protection.

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
    scores.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)
    scores.masked_fill_(protected, torch.inf)
    keep = native.best(scores, slots)
    if keep is not None:
        return keep
    keep = torch.empty(scores.shape[0], slots, dtype=torch.int64, device=scores.device)
    for head, row in enumerate(scores):
        # No sort: the least score that stays, what lies above it, and as many of its equals as there is room for.
        minimum = row.kthvalue(len(row) - slots + 1).values
        chosen, ties = row > minimum, row == minimum
        room = slots - chosen.sum()
        chosen |= ties & (ties.cumsum(0, dtype=torch.int32) <= room)
        keep[head] = chosen.nonzero()[:, 0]
    return keep
