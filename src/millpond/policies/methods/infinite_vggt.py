"""InfiniteVGGT's rolling memory: KeyDiff behind an immovable first frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from millpond import ops
from millpond.errors import PolicyError
from millpond.policies.allocators.diversity import Diversity
from millpond.policies.base import LAYER_SHARE, TEXT, Needs, Scorer, Shape, View
from millpond.policies.scoring.keys import unit_keys_scratch


@dataclass(frozen=True)
class InfiniteVGGT(Scorer):
    """Keep the stream's first frame, and of all later tokens those with the most distinctive keys.

    The anchor is everything up to the end of the first frame group. The others, the candidates, are scored as in KeyDiff, by
    -cos(k_i, mean unit key), with the mean over the candidates alone, as the code has it. The anchor comes right after what
    the memory protects; where not even both fit, its first tokens stay and no candidate does.

    Layers share the memory as `Diversity` has it: softmax over the layers of (1 - s_l) / temperature, s_l the mean alikeness
    of the candidates' keys. Ours is that no layer keeps more than twice the mean, and that rounding loses no token.

    Attributes:
        temperature: of the layer budgets. Published: 0.5. None for equal budgets.
    """

    name: ClassVar[str] = "infinite-vggt"
    source: ClassVar[str] = "Yuan et al., InfiniteVGGT, 2026 (arXiv 2601.02281): code of attention and budgets"

    temperature: float | None = 0.5

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise PolicyError(f"infinite-vggt: temperature must be above 0 or None, not {self.temperature!r}")

    @property
    def needs(self) -> Needs:
        return Needs() if self.temperature is None else Needs(layer_share=LAYER_SHARE)

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        assert self.temperature is not None  # else nobody asks
        return Diversity(self.temperature).weights(views, _anchors)

    def score(self, view: View) -> Tensor:
        scores = torch.empty(view.heads, view.tokens, device=view.keys.device)
        for keys, anchor, row in zip(view.keys, _anchors(view), scores, strict=True):
            row[:anchor] = torch.inf
            ops.distinctiveness(keys[anchor:], view.chunk, row[anchor:])
        return scores

    def scratch(self, shape: Shape) -> int:
        # The masks and times of one head are gone before its ranking begins.
        return super().scratch(shape) + unit_keys_scratch(shape)


def _anchors(view: View) -> list[int]:
    """Tokens of each head up to the end of the first frame."""
    anchors = []
    for times, grid_position in zip(view.time_us, view.grid_position, strict=True):
        seen = times[grid_position[:, 0] != TEXT]
        anchors.append(int((times <= seen[0]).sum()) if len(seen) else 0)
    return anchors
