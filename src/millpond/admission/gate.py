"""From verdicts to tokens: which tokens of a block of frames an admission lets in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from millpond.admission.base import Admission, Verdict
from millpond.models.base import Tokens


def filter_groups(admission: Admission, tokens: Tokens, state: Any) -> tuple[Tensor, tuple[Verdict, ...], Any]:
    """Judge each frame group of a block.

    A reduced group keeps the vision tokens whose row and column have an even sum, a checkerboard: half of every row and of
    every column, the top left one among them. Separators and timestamps of a group stay with it.

    Returns:
        The tokens let in as int64 [m], ascending; the verdict on each group; the new state.
    """
    keep: list[Tensor] = []
    verdicts: list[Verdict] = []
    _, counts = tokens.time_us.unique_consecutive(return_counts=True)
    for at in torch.arange(len(tokens)).split(counts.tolist()):
        visual = tokens.visual[at]
        feature = tokens.embeds[at[visual].to(tokens.embeds.device)].float().mean(dim=0)
        verdict, state = admission.judge(feature, state)
        verdicts.append(verdict)
        if verdict == "reduced":
            at = at[~visual | (tokens.grid_position[at].sum(dim=1) % 2 == 0)]
        if verdict != "drop":
            keep.append(at)
    return torch.cat([*keep, torch.empty(0, dtype=torch.long)]), tuple(verdicts), state
