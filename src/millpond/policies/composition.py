"""What goes with what: one table of the pairs that do not, and the base of policies that stand around another one.

Whatever is not in the table works, and a test tries every wrapper around every policy.
"""

from __future__ import annotations

from abc import abstractmethod, update_abstractmethods
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from torch import Tensor

from millpond.errors import PolicyError
from millpond.policies.base import Policy, View

# What a policy may bring ...
QUERIES, PROXY_TEXT = "a proxy's queries", "a proxy text"
ACCUMULATED, POSITIONS = "accumulated attention", "positions"
DEEPER, MERGING, WHOLE_FRAMES = "deeper scores", "merging", "whole frames"
RETRIEVAL, NO_RETRIEVAL, NO_CAP = "retrieval", "a policy without retrieval", "no cap"
QUANTIZED_TIER, LAYER_BUDGETS = "a quantized tier", "layer budgets"
# ... and what it may meet.
POND_CACHE, ADMISSION, TURNS, SEPARATORS = "a PondCache", "an admission", "remembered turns", "tokens between frames"
HOST_MEMORY, NO_HOST_MEMORY = "host memory", "a session without host memory"

_FEATURES: dict[str, Callable[[Policy], bool]] = {
    QUERIES: lambda policy: policy.needs.proxy is not None,
    PROXY_TEXT: lambda policy: policy.needs.proxy == "prompt",
    ACCUMULATED: lambda policy: policy.needs.accumulated_attention,
    DEEPER: lambda policy: policy.needs.deeper_scores,
    MERGING: lambda policy: policy.needs.merging,
    POSITIONS: lambda policy: policy.needs.positions,
    WHOLE_FRAMES: lambda policy: policy.needs.whole_frames,
    RETRIEVAL: lambda policy: policy.needs.retrieved_frames > 0,
    NO_RETRIEVAL: lambda policy: not policy.needs.retrieved_frames,
    QUANTIZED_TIER: lambda policy: policy.needs.quantized_tier is not None,
    LAYER_BUDGETS: lambda policy: policy.needs.layer_share > 1,
    NO_CAP: lambda policy: not policy.capped,
}

_TWICE = "what leaves the memory lives on there, and folded into what stays it would count twice"
_NOTHING_LEAVES = "nothing ever leaves"
REFUSED: dict[tuple[str, str], str] = {
    (MERGING, QUANTIZED_TIER): _TWICE,
    (MERGING, RETRIEVAL): _TWICE,
    (MERGING, NO_CAP): _NOTHING_LEAVES,
    (POSITIONS, QUANTIZED_TIER): "quantized tokens show none",
    (WHOLE_FRAMES, QUANTIZED_TIER): "single tokens are quantized",
    (RETRIEVAL, QUANTIZED_TIER): "what leaves the memory can go to one place only",
    (QUANTIZED_TIER, LAYER_BUDGETS): "tokens are quantized with equal layers only",
    (QUANTIZED_TIER, NO_CAP): _NOTHING_LEAVES,
    (WHOLE_FRAMES, LAYER_BUDGETS): "layers would differ by single tokens",
    (RETRIEVAL, LAYER_BUDGETS): "frames leave all layers at once",
    (LAYER_BUDGETS, NO_CAP): _NOTHING_LEAVES,
    (RETRIEVAL, NO_CAP): _NOTHING_LEAVES,
    (RETRIEVAL, NO_HOST_MEMORY): "give it a host_budget",
    (NO_RETRIEVAL, HOST_MEMORY): "leave out host_budget and host_path",
    (PROXY_TEXT, POND_CACHE): "only a Session has the chat template's tokens to run",
    (RETRIEVAL, POND_CACHE): "only a Session retrieves from host memory",
    (WHOLE_FRAMES, ADMISSION): "it thins frames, which must be of one size",
    (WHOLE_FRAMES, TURNS): "the policy knows frames only",
    (WHOLE_FRAMES, SEPARATORS): "the policy knows frames only",
}
"""Pairs that do not go together, and why."""


def features(policy: Policy) -> list[str]:
    """What of the table a policy brings."""
    return [name for name, brought in _FEATURES.items() if brought(policy)]


def check(policy: Policy, *meets: str) -> None:
    """Hold a policy, and what it meets, to the table.

    Raises:
        PolicyError: two of them do not go together; one line says which and why.
    """
    for one, other in combinations([*features(policy), *meets], 2):
        why = REFUSED.get((one, other)) or REFUSED.get((other, one))
        if why:
            raise PolicyError(f"{_named(policy)}: {one} and {other} do not go together: {why}")


def _named(policy: Policy) -> str:
    around = f" around {policy.inner.name!r}" if isinstance(policy, Wrapper) else ""
    return f"the policy {policy.name!r}{around}"


class _Delegated:
    """A member of `Policy` that a wrapper reads off the policy inside it; read off the class, it is the base's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Wrapper | None, owner: type[Wrapper]) -> Any:
        return getattr(Policy if wrapper is None else wrapper.inner, self._name)


@dataclass(frozen=True)
class Wrapper(Policy):
    """Base of policies that add something to another one, the inner one, which does everything else.

    All public members of `Policy` are the inner policy's, also those that it will have one day. A subclass overrides what it adds; its
    `needs` are the inner ones with one thing replaced.
    """

    adds: ClassVar[str]
    """Which of the table's features it adds; the inner policy must not have it already."""

    @property
    @abstractmethod
    def inner(self) -> Policy:
        """The policy that it stands around."""

    def __post_init__(self) -> None:
        if self.adds in features(self.inner):
            raise PolicyError(f"{_named(self)}: that one has {self.adds} already")
        check(self)

    def keep(self, view: View, slots: int) -> Tensor:
        return self.inner.keep(view, slots)  # the one that the base leaves abstract


for _member in vars(Policy):
    if not _member.startswith("_") and _member not in vars(Wrapper):
        setattr(Wrapper, _member, _Delegated(_member))
update_abstractmethods(Wrapper)  # type: ignore[type-abstract]
