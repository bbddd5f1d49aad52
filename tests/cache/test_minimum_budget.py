"""The minimum budget that a plan accepts carries a stream, whatever the policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import policies
from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.host import HostCache
from millpond.errors import BudgetError
from millpond.memory.geometry import Geometry
from millpond.policies.registry import POLICIES
from millpond.positions import Rope

WIDTH = 8
ROPE = Rope(1.0 / (10_000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)), torch.tensor([0, 0, 1, 2]), limit=600)
NAMES = [*(one.name for one in POLICIES.available() if one.capped), "recent+diversity"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(
    layers=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    prompt=st.integers(1, 5),
    spare=st.integers(0, 3),
)
def test_the_least_budget_carries_many_blocks(
    name: str, layers: int, grid: tuple[int, int], prompt: int, spare: int
) -> None:
    policy = policies.read(name)
    geometry = Geometry(layers, 2, WIDTH, torch.float32, axes=3)
    numbers = {"prompt_tokens": prompt, "group_tokens": grid[0] * grid[1], "reserve_tokens": 4, "proxy_tokens": 3}
    with pytest.raises(BudgetError) as minimum:
        make_plan(1, geometry, policy, **numbers)
    budget = minimum.value.minimum + spare * geometry.bytes_per_token
    plan = make_plan(budget, geometry, policy, **numbers)
    pond = Pond(geometry, plan, policy, torch.device("cpu"))
    pond.rope = ROPE
    pond.queries.rows.normal_()
    pond.queries.counts = [plan.query_bytes // geometry.query_bytes] * layers
    if policy.needs.retrieved_frames:
        pond.host = HostCache(geometry, ROPE, 1 << 20)
    cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2).to(torch.int16)
    grid_position = cells.repeat(plan.block_groups, 1)
    pond_prompt = torch.zeros(prompt, dtype=torch.int64)
    for block in range(-1, 40):
        times = (
            (torch.arange(plan.block_groups) + 4 * block).repeat_interleave(len(cells)) if block >= 0 else pond_prompt
        )
        at = grid_position if block >= 0 else torch.full((prompt, 2), -1, dtype=torch.int16)
        if block >= 0:
            pond.ensure_capacity(len(times))
        pond.write_metadata(times, at, times.expand(3, -1))
        for layer in range(layers):
            pond.update(torch.randn(1, 2, len(times), WIDTH), torch.randn(1, 2, len(times), WIDTH), layer)
        if block >= 0:
            pond.commit(times, at)
        assert pond.ledger.held <= budget
    assert pond.compactions > 3
