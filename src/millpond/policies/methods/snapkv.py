"""SnapKV: what the latest tokens look at, pooled along the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Needs, Scorer, Shape, View, check_whole
from millpond.policies.scoring.attention import proxy_attention, proxy_scratch
from millpond.policies.scoring.window import keep_window, pool_in_front, window_scratch


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Keep the latest `window` tokens and, of the others, those that they attend to most:

        score(i) = pool over `kernel` neighbours of  mean over the window's queries q and the group's heads of softmax(q k_i / sqrt(D)).

    As in the authors' program (FasterDecoding/SnapKV) and kvpress, the window's tokens see nothing newer than themselves and only the
    tokens in front of the window are pooled, with those beside them in memory. The window is the end of the frames that ran last, so
    no question reaches it; what a remembered turn said behind them is part of the window and does not ask. Published for
    multi-head attention; the mean over a KV head's group is kvpress's.

    Attributes:
        window: latest tokens that ask. Published: 32.
        kernel: odd size of the pooling, 1 for none. Published: 5.
        pooling: "avg" as in the released default, or "max".
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "Li et al., SnapKV, 2024 (arXiv 2404.14469): code"

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        check_whole(self, 1, "window")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"snapkv: kernel must be odd, not {self.kernel!r}")
        if self.pooling not in ("avg", "max"):
            raise PolicyError(f"snapkv: pooling must be 'avg' or 'max', not {self.pooling!r}")

    @property
    def needs(self) -> Needs:
        return Needs(proxy="latest", queries=self.window)

    def score(self, view: View) -> Tensor:
        scores = proxy_attention(view, latest=True)
        pool_in_front(scores, self.window, self.kernel, self.pooling)
        return scores

    def protected(self, view: View, slots: int) -> Tensor:
        return keep_window(view, self.window, slots)

    def scratch(self, shape: Shape) -> int:
        return super().scratch(shape) + window_scratch(shape) + proxy_scratch(shape)
