"""H2O: heavy hitters, by the attention that they have received so far, and the latest tokens. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.attention import attention_scratch
from millpond.policies.base import Policy, View, check_between, keep_top
from millpond.policies.snapkv import keep_window

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(Policy):
    """Keep the latest tokens, and of the others those with the largest sum of attention received:

        score(i) = sum over all frame tokens t >= i that came so far, and the group's heads, of softmax(q_t k_i / sqrt(D)),

    each softmax over what was in memory when t came. The cache keeps the sums beside the keys (4 bytes a head and slot). They are
    never divided by age, as published: an old token has had more queries than a young one. Queries of questions and answers do
    not count, remembered or not. Published for multi-head attention; the sum over a KV head's group is ours.

    Attributes:
        recent_share: share of the memory for the latest tokens. Published: a half.
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "Zhang et al., H2O, NeurIPS 2023 (arXiv 2306.14048): notes on paper and code"
    accumulated_attention: ClassVar[bool] = True

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "recent_share")

    def keep(self, view: View, slots: int) -> Tensor:
        if view.accumulated_attention is None:
            raise PolicyError("h2o: nobody summed up the attention: only a Session does")
        return keep_top(
            view.accumulated_attention.clone(), keep_window(view, round(self.recent_share * slots), slots), slots
        )

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        choice = super().scratch(heads, tokens, head_dim, block, chunk) + heads * tokens
        # Summing up a block: `chunk` of its queries at a time (or one token's group), turned to their positions.
        rows = max(chunk, _WIDEST_GROUP)
        return max(choice, attention_scratch(rows, head_dim, chunk) + rows * (16 + 30 * head_dim))


# Query heads to a KV head of the widest models at hand.
_WIDEST_GROUP = 16
