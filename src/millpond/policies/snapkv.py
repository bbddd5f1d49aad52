"""SnapKV: what the latest tokens look at, pooled along the stream. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from millpond.errors import PolicyError
from millpond.policies.attention import attention_scratch, proxy_attention
from millpond.policies.base import Policy, View, keep_top

__all__ = ["SnapKV", "keep_window", "pool_in_front"]


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keep the latest `window` tokens and, of the others, those that they attend to most:

        score(i) = pool over `kernel` neighbours of  mean over the window's queries q and the group's heads of softmax(q k_i / sqrt(D)).

    As in the authors' program (FasterDecoding/SnapKV) and kvpress, the window's tokens see nothing newer than themselves and only the
    tokens in front of the window are pooled, with those beside them in memory. The window is the end of the frames that ran last, so
    no question reaches it; what a remembered turn said behind them is part of the window and does not ask. Published for
    multi-head attention; the mean over a KV head's group is kvpress's.

    Attributes:
        window: latest tokens that ask. Published: 32.
        kernel: odd width of the pooling, 1 for none. Published: 5.
        pooling: "avg" as in the released default, or "max".
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "Li et al., SnapKV, 2024 (arXiv 2404.14469): code"
    proxy: ClassVar[Literal["latest"]] = "latest"

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise PolicyError(f"snapkv: window must be a whole number of tokens, at least 1, not {self.window!r}")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"snapkv: kernel must be odd, not {self.kernel!r}")
        if self.pooling not in ("avg", "max"):
            raise PolicyError(f"snapkv: pooling must be 'avg' or 'max', not {self.pooling!r}")

    @property
    def queries(self) -> int:
        return self.window

    def keep(self, view: View, slots: int) -> Tensor:
        scores = proxy_attention(view, latest=True)
        pool_in_front(scores, self.window, self.kernel, self.pooling)
        return keep_top(scores, keep_window(view, self.window, slots), slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        choice = super().scratch(heads, tokens, head_dim, block, chunk) + heads * tokens
        return choice + attention_scratch(chunk, head_dim, chunk)


def pool_in_front(scores: Tensor, window: int, kernel: int, pooling: Literal["avg", "max"] = "avg") -> None:
    """Pool the scores, float32 [H, n], of the tokens in front of the latest `window` over `kernel` neighbours, in place."""
    count = scores.shape[1] - window
    if count < 1:
        return
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    for row in scores[:, :count]:
        row.copy_(pool(row[None], kernel, stride=1, padding=kernel // 2)[0])


def keep_window(view: View, window: int, slots: int) -> Tensor:
    """The protected tokens and as many of the latest `window` as there is room for: bool [H, n]."""
    protected = view.protected.clone()
    room = slots - int(protected[0].sum())
    # In every head equally many, and no more than fit beside the protected ones.
    protected[:, max(0, view.tokens - min(window, room)) :] = True
    return protected
