"""A change of storage: every tensor arrives whole, and the cap holds at every allocation; the machine's refusal changes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.plan import Plan
from millpond.errors import BudgetError
from millpond.memory.geometry import Geometry
from millpond.policies.base import Policy
from millpond.policies.methods.mikv import MiKV
from millpond.stream.consumers import FramesAsPixels
from tests.cache.test_pond import Stream
from tests.cache.text_model import Scattered
from tests.session.measure import held_bytes
from tests.session.test_layer_budgets import layered

POLICIES: dict[str, Policy] = {
    "a layer each": Scattered(),
    "arena": layered("random", 0.6, 1.4, 1.0, 0.8),
    "low bits": MiKV(bits=4, group=4, full_share=0.5, base=Scattered()),
}


def plan_for(policy: Policy, geometry: Geometry, group: int, above: int) -> Plan:
    waiting = FramesAsPixels(4 * group, recent=0, reopening_tokens=0).waiting
    numbers: dict[str, Any] = {"prompt_tokens": 3, "group_tokens": group, "reserve_tokens": 5, "beside": [waiting]}
    with pytest.raises(BudgetError) as minimum:
        make_plan(1, geometry, policy, **numbers)
    return make_plan(minimum.value.minimum + above * geometry.bytes_per_token, geometry, policy, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    width=st.sampled_from([2, 8, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group=st.integers(2, 9),
    tokens=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 8)), min_size=1, max_size=4),
)
def test_storage_changes_at_any_time(
    kind: str, layers: int, heads: int, width: int, dtype: torch.dtype, group: int, tokens: list[tuple[int, int]]
) -> None:
    """At first for text alone, as when somebody asks before the first frame; then for frames, then for other budgets."""
    policy, geometry = POLICIES[kind], Geometry(layers, heads, width, dtype, axes=3)
    plan = plan_for(policy, geometry, group, tokens[0][0])
    numbers = {"prompt_tokens": 3, "reserve_tokens": 5}
    pond = Pond(geometry, make_plan(plan.budget, geometry, policy, **numbers), policy, torch.device("cpu"))
    stream = Stream(pond)
    stream.add(3, 0, prompt=True)
    time, zeros, limit = 0, torch.zeros, 0
    held: list[int] = []

    def watched(*args: object, **kwargs: object) -> torch.Tensor:
        new: torch.Tensor = zeros(*args, **kwargs)  # type: ignore[call-overload]
        held.append(held_bytes(SimpleNamespace(family=None, pond=pond), new))  # type: ignore[arg-type]
        return new

    for above, frames in tokens:
        plan = plan_for(policy, geometry, group, above)
        limit = max(pond.plan.budget or 0, plan.budget or 0)
        held.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "zeros", watched)
            pond.resize(plan)
        assert all(size <= limit for size in held)
        assert pond.storage.nbytes == pond.ledger.account("storage")
        assert pond.ledger.held <= pond.ledger.limit == plan.budget
        for _ in range(frames):
            time += 1
            stream.add(group, time)
        assert stream.check()


@pytest.mark.parametrize("kind", POLICIES)
def test_memory_that_the_machine_does_not_have_is_one_line(kind: str) -> None:
    policy, geometry = POLICIES[kind], Geometry(4, 2, 8, torch.float32, axes=3)
    pond = Pond(geometry, plan_for(policy, geometry, 6, 40), policy, torch.device("cpu"))
    stream = Stream(pond)
    stream.add(3, 0, prompt=True)
    for time in range(1, 12):
        stream.add(6, time)
    before, plan, books = stream.check(), pond.plan, (pond.ledger.held, pond.ledger.limit, pond.storage.nbytes)
    with pytest.raises(BudgetError, match="smaller budget"):
        pond.resize(plan_for(policy, geometry, 6, 1 << 50))
    assert (pond.plan, pond.ledger.held, pond.ledger.limit, pond.storage.nbytes) == (plan, *books)
    assert stream.check() == before
    with pytest.raises(BudgetError, match="smaller budget"):
        Pond(geometry, plan_for(policy, geometry, 6, 1 << 50), policy, torch.device("cpu"))
