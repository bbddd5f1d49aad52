"""H2O: heavy hitters, by the attention that they have received so far, and the latest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Needs, Scorer, Shape, View, check_between
from millpond.policies.scoring.window import keep_window, window_scratch


@dataclass(frozen=True)
class H2O(Scorer):
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
    needs: ClassVar[Needs] = Needs(accumulated_attention=True)

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "recent_share")

    def score(self, view: View) -> Tensor:
        if view.accumulated_attention is None:
            raise PolicyError("h2o: attention has not been accumulated: only a Session does that")
        return view.accumulated_attention.clone()

    def protected(self, view: View, slots: int) -> Tensor:
        return keep_window(view, round(self.recent_share * slots), slots)

    def scratch(self, shape: Shape) -> int:
        return super().scratch(shape) + window_scratch(shape)
