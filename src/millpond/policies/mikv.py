"""MiKV: important tokens as they are, the others in few bits instead of none. Knows no scores: those are another policy's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from millpond.cache.kv_quantizer import KVQuantizer
from millpond.cache.tier import Tier
from millpond.errors import PolicyError
from millpond.policies.base import Policy, View
from millpond.policies.registry import read

__all__ = ["MiKV"]


@dataclass(frozen=True)
class MiKV(Policy):
    """Keep what another policy finds important in full precision, and pack what it would forget.

    Of the remembered tokens a share `full_share`, chosen by `base`, stays as it is; what leaves it is packed by the codec of
    KIVI, keys per channel and values per token in groups of `group`. When the packed tokens have used up their room, `base`
    chooses again, among them and the protected ones, and whole groups go, those with the fewest tokens that it would keep: a
    group is packed once. The paper's channel balancer, which the keys' own channels make needless, is left out.

    Attributes:
        bits: of a packed number: 2, 3, 4 or 8.
        full_share: of the remembered tokens, those in full precision. Published: 0.2 and more.
        base: the policy that scores, by name or itself; layer budgets are not possible.
        group: tokens that are packed together, and channels of a value that share a step. KIVI's: 32.
    """

    name: ClassVar[str] = "mikv"
    source: ClassVar[str] = (
        "Yang et al., No Token Left Behind (MiKV), 2024 (arXiv 2402.18096), and Liu et al., KIVI, ICML 2024: notes on the papers"
    )

    bits: int = 4
    full_share: float = 0.2
    base: str | Policy = "infinipot-v"
    group: int = 32

    def __post_init__(self) -> None:
        scorer = read(self.base) if isinstance(self.base, str) else self.base
        if not scorer.capped or scorer.whole_frames or scorer.tier:
            raise PolicyError(f"mikv: {scorer.name} cannot choose single tokens to pack")
        if scorer.layer_share > 1:
            raise PolicyError(f"mikv: {scorer.name} has layer budgets, and tokens are packed with equal layers only")
        # A frozen dataclass: the parameters stay what was given, and what the base needs becomes this policy's need.
        object.__setattr__(self, "_scorer", scorer)
        object.__setattr__(self, "_tier", Tier(KVQuantizer(self.bits, self.group), self.full_share))
        for need in ("agnostic", "proxy", "accumulated_attention", "deepest_first"):
            object.__setattr__(self, need, getattr(scorer, need))

    @property
    def scorer(self) -> Policy:
        """The policy that scores."""
        scorer: Policy = self.__dict__["_scorer"]
        return scorer

    @property
    def tier(self) -> Tier:
        tier: Tier = self.__dict__["_tier"]
        return tier

    @property
    def queries(self) -> int:
        return self.scorer.queries

    def recent(self, frames: int) -> int:
        return self.scorer.recent(frames)

    def keep(self, view: View, slots: int) -> Tensor:
        return self.scorer.keep(view, slots)

    def scratch(self, heads: int, tokens: int, head_dim: int, block: int, chunk: int) -> int:
        return self.scorer.scratch(heads, tokens, head_dim, block, chunk)
