"""ReKV: the device keeps a window, host memory keeps what left it, and a question retrieves frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond.policies.base import Needs, Scorer, View, check_whole


@dataclass(frozen=True)
class ReKV(Scorer):
    """Keep the latest tokens; what leaves them goes to host memory, from which a question retrieves whole frames.

    The pinned prompt is the sink. A question retrieves, in each layer by itself, the frames whose mean key has the
    largest dot product with its mean query over all heads (`millpond.cache.retrieval`); they are dropped again behind it. Needs `Session(host_budget=)`.

    Differences to the authors' program (Becomebright/ReKV): a question there sees the sink and what it retrieves, and nothing of
    the window but what it retrieves of it, all frames so far being there to be retrieved; here it sees the window too, which lies on the
    device anyway, and retrieves from what has left it. Host memory has a cap, and when it is full the oldest frames are forgotten; under a
    small device budget fewer frames are retrieved (half of what lies behind the prompt, at least one; `Plan.retrieved_frames`). The mean
    query runs over the whole turn, theirs over the question's text; text that leaves the window is forgotten.

    Attributes:
        frames: frame groups that a question retrieves. Published: 64.
    """

    name: ClassVar[str] = "rekv"
    source: ClassVar[str] = "Di et al., ReKV, ICLR 2025 (arXiv 2503.00540): code"

    frames: int = 64

    def __post_init__(self) -> None:
        check_whole(self, 1, "frames")

    @property
    def needs(self) -> Needs:
        return Needs(retrieved_frames=self.frames)

    def score(self, view: View) -> Tensor:
        age = torch.arange(view.tokens, dtype=torch.float32, device=view.keys.device)
        return age.repeat(view.heads, 1)
