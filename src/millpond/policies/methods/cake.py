"""CAKE's score of a token: attention that is high or changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Needs, Scorer, Shape, View, check_whole
from millpond.policies.scoring.attention import attention_moments, moments_scratch
from millpond.policies.scoring.window import keep_window, pool_in_front

_KERNEL = 5


@dataclass(frozen=True)
class CAKE(Scorer):
    """Keep the latest `window` tokens and, of the others, those with the best

        score(i) = pool over 5 neighbours of  mean_w(A_i) + gamma * var_w(A_i),

    with A the attention of the window's w queries, none of which sees a newer token; only tokens in front of the window are pooled, both
    as in the authors' program (antgroup/cakekv). Mean and variance are taken per query head, then averaged over a KV head's
    group. Every layer keeps equally many tokens here; the paper's budgets by a layer's entropy and variance are an allocator's.

    Attributes:
        window: latest tokens that ask. Published: 32.
        gamma: weight of the variance. Published: 200, the default of the authors' experiments.
    """

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = "Qin et al., CAKE, ICLR 2025 (arXiv 2503.12491): code"

    window: int = 32
    gamma: float = 200.0

    def __post_init__(self) -> None:
        check_whole(self, 1, "window")
        if not 0 <= self.gamma < float("inf"):
            raise PolicyError(f"cake: gamma must be a number of at least 0, not {self.gamma}")

    @property
    def needs(self) -> Needs:
        return Needs(proxy="latest", queries=self.window)

    def score(self, view: View) -> Tensor:
        scores, variance = attention_moments(view)
        scores += variance.mul_(self.gamma)
        del variance
        pool_in_front(scores, self.window, _KERNEL)
        return scores

    def protected(self, view: View, slots: int) -> Tensor:
        return keep_window(view, self.window, slots)

    def scratch(self, shape: Shape) -> int:
        # The variance, counted with the moments, is gone before the window's mask is there.
        return super().scratch(shape) + moments_scratch(shape, self.window)
