"""Policies by name. Built-in ones and those of other packages register alike: by the entry point group `millpond.policies`."""

from __future__ import annotations

from millpond.errors import PolicyError
from millpond.plugins import Plugins
from millpond.policies.allocators.base import Allocator
from millpond.policies.base import Policy
from millpond.policies.layered import Layered

POLICIES: Plugins[Policy] = Plugins("millpond.policies", Policy, "policy")  # type: ignore[type-abstract]
ALLOCATORS: Plugins[Allocator] = Plugins("millpond.allocators", Allocator, "allocator")  # type: ignore[type-abstract]
available, get = POLICIES.available, POLICIES.get


def read(text: str) -> Policy:
    """Make a policy from one word: `name`, `name:parameter=value:...`, or `policy+allocator` for layer budgets.

    Raises:
        PolicyError: not of this form, unknown, or the policy cannot be given layer budgets.
    """
    policy, plus, allocator = text.partition("+")
    if plus and not allocator:
        raise PolicyError(f"{text!r}: name an allocator behind the plus: {', '.join(sorted(ALLOCATORS.found))}")
    scorer = POLICIES.read(policy)
    return Layered(scorer, ALLOCATORS.read(allocator)) if plus else scorer


def write(policy: Policy) -> str:
    """The word that `read` makes an equal policy from.

    Raises:
        PolicyError: there is none: one of its parameters is a policy itself, say, or it is not registered.
    """
    if not isinstance(policy, Layered):
        return POLICIES.write(policy)
    word = f"{POLICIES.write(policy.scorer)}+{ALLOCATORS.write(policy.allocator)}"
    return POLICIES.same(policy, word, read)
