"""StreamMem: what the chat template's own tokens look at. Knows neither time nor place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from millpond.policies.attention import attention_scratch, proxy_attention
from millpond.policies.base import Policy, View, keep_top

__all__ = ["StreamMem"]


@dataclass(frozen=True)
class StreamMem(Policy):
    """Keep the tokens that the chat template's own tokens behind the video attend to most, in each head:

        score(i) = mean over the template's queries q and the group's heads of softmax(q k_i / sqrt(D)).

    The template runs without a question, for each compaction anew, and leaves no trace. It is what a model asks when it is about
    to describe what it saw. Not here: the merge of every frame into one more, attention-weighted key and value, and the filter
    of like frames before the vision tower. There are no parameters.
    """

    name: ClassVar[str] = "streammem"
    source: ClassVar[str] = "Yang et al., StreamMem, 2025 (arXiv 2508.15717): notes on the paper; without its merging"
    proxy: ClassVar[Literal["prompt"]] = "prompt"

    def keep(self, view: View, slots: int) -> Tensor:
        return keep_top(proxy_attention(view), view.protected, slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        return super().scratch(heads, tokens, head_dim, block, chunk) + attention_scratch(chunk, head_dim, chunk)
