"""MiKV: important tokens as they are, the others in few bits instead of none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from millpond.errors import PolicyError
from millpond.kv_quantization.quantizer import KVQuantizer
from millpond.kv_quantization.tier import QuantizedTier
from millpond.policies import DEFAULT_POLICY
from millpond.policies.base import Needs, Policy
from millpond.policies.composition import QUANTIZED_TIER, Wrapper
from millpond.policies.registry import read


@dataclass(frozen=True)
class MiKV(Wrapper):
    """Keep what another policy finds important in full precision, and quantize what it would forget.

    Of the remembered tokens a share `full_share`, chosen by `base`, stays as it is; what leaves it is quantized as in
    KIVI, keys per channel and values per token in groups of `group`. When the quantized tokens have used up their storage, `base`
    chooses again, among them and the protected ones, and whole groups go, those with the fewest tokens that it would keep: a
    group is quantized once. The paper's channel balancer, which the keys' own channels make needless, is left out.

    Attributes:
        bits: of a quantized number: 2, 3, 4 or 8.
        full_share: of the remembered tokens, those in full precision. Published: 0.2 and more.
        base: the policy that scores, by name or itself. Not every one goes: `millpond.policies.composition`.
        group: tokens that are quantized together, and channels of a value that share a step. KIVI's: 32.
    """

    adds: ClassVar[str] = QUANTIZED_TIER
    name: ClassVar[str] = "mikv"
    source: ClassVar[str] = (
        "Yang et al., No Token Left Behind (MiKV), 2024 (arXiv 2402.18096), and Liu et al., KIVI, ICML 2024: notes on the papers"
    )

    bits: int = 4
    full_share: float = 0.2
    base: str | Policy = DEFAULT_POLICY
    group: int = 32

    @cached_property
    def inner(self) -> Policy:
        inner = read(self.base) if isinstance(self.base, str) else self.base
        if not isinstance(inner, Policy):
            raise PolicyError(f"mikv: base must be a name or a Policy, not {inner!r}")
        return inner

    @cached_property
    def tier(self) -> QuantizedTier:
        """How much is quantized, and how."""
        return QuantizedTier(KVQuantizer(self.bits, self.group), self.full_share)

    @property
    def needs(self) -> Needs:
        return replace(self.inner.needs, quantized_tier=self.tier)
