"""The split: it adds up, it never passes the budget, and the minimum that works is exactly that."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache.consumers import make_plan
from millpond.cache.plan import Plan, _first, _most
from millpond.errors import BudgetError
from millpond.memory.geometry import Geometry
from millpond.policies.base import Needs
from millpond.stream.consumers import FramesAsPixels
from tests.cache.text_model import Newest

QWEN_7B = Geometry(layers=28, kv_heads=4, head_dim=128, dtype=torch.bfloat16, axes=3)
SMALL = Geometry(layers=4, kv_heads=2, head_dim=32, dtype=torch.float32, axes=3)


def split(budget: int, geometry: Geometry = SMALL, frame_bytes: int = 64 * 64 * 3, **changes: Any) -> Plan:
    numbers = {"prompt_tokens": 9, "group_tokens": 16, "frames_per_group": 2} | changes
    frames = FramesAsPixels(frame_bytes, recent=0, reopening_tokens=0)
    return make_plan(budget, geometry, Newest(), beside=[frames.waiting], **numbers)


def test_bytes_per_token_of_a_known_model() -> None:
    """Qwen2-VL-7B in bfloat16: 56 KiB of keys and values a token, and 24 bytes of metadata per layer and head."""
    assert QWEN_7B.kv_bytes_per_token == 57_344
    assert QWEN_7B.bytes_per_token == 57_344 + 28 * 4 * 24


@settings(deadline=None)
@given(
    budget=st.integers(200_000, 10**9),
    prompt=st.integers(0, 40),
    group=st.integers(1, 300),
    frame=st.integers(0, 20_000),
    reserve=st.none() | st.integers(0, 100),
)
def test_the_split_adds_up_under_the_budget(
    budget: int, prompt: int, group: int, frame: int, reserve: int | None
) -> None:
    numbers = {"prompt_tokens": prompt, "group_tokens": group, "frame_bytes": frame, "reserve_tokens": reserve}
    with pytest.raises(BudgetError) as caught:
        split(1, **numbers)
    minimum = caught.value.minimum
    assert minimum is not None
    with pytest.raises(BudgetError):
        split(minimum - 1, **numbers)
    budget = max(budget, minimum)
    plan = split(budget, **numbers)
    assert plan.prompt_tokens + plan.memory_tokens + plan.headroom_tokens + plan.reserve_tokens == plan.slots
    assert sum(line.slots for line in plan.lines) == plan.slots
    assert sum(line.bytes for line in plan.lines) == plan.total_bytes <= budget
    assert plan.memory_tokens >= group
    assert plan.headroom_tokens >= plan.block_tokens >= group
    assert plan.headroom_tokens % plan.block_tokens == 0, "part of a block's room would never be used"
    if reserve is not None:
        assert plan.reserve_tokens == reserve


@settings(deadline=None)
@given(budget=st.integers(600_000, 10**8), more=st.integers(1, 10**7), group=st.integers(1, 60))
def test_nothing_but_the_memory_shrinks_when_the_budget_grows(budget: int, more: int, group: int) -> None:
    small, large = (split(size, group_tokens=group) for size in (budget, budget + more))
    assert small.slots <= large.slots
    for before, after in zip(small.lines, large.lines, strict=True):
        # The headroom goes up by whole blocks: what it gains the memory may lose.
        slack = small.headroom_tokens - large.headroom_tokens if before.name == "memory" else 0
        assert after.slots >= before.slots + slack
        assert after.bytes >= before.bytes + slack * small.bytes_per_token


def test_no_bytes_are_left_lying_about() -> None:
    for budget in (1_000_000, 3_333_333, 10_000_000):
        plan = split(budget)
        assert budget - plan.total_bytes < 3 * plan.bytes_per_token


@pytest.mark.parametrize(("geometry", "budget"), [(QWEN_7B, 400 << 20), (SMALL, 4 << 20)])
def test_scratch_is_at_most_a_twentieth(geometry: Geometry, budget: int) -> None:
    plan = split(budget, geometry)
    assert plan.scratch_bytes <= budget / 20


def test_whole_frames_round_the_memory_down() -> None:
    class Whole(Newest):
        needs = Needs(whole_frames=True)

    plan = make_plan(2 << 20, SMALL, Whole(), prompt_tokens=9, group_tokens=16, frames_per_group=2)
    assert plan.memory_tokens % 16 == 0
    assert plan.prompt_tokens + plan.memory_tokens + plan.headroom_tokens + plan.reserve_tokens == plan.slots


def test_the_error_names_the_least_and_what_for() -> None:
    with pytest.raises(BudgetError, match=r"too small for frames of 64 x 64: the minimum that works is \d+ bytes"):
        make_plan(1000, SMALL, Newest(), prompt_tokens=9, group_tokens=16, what="frames of 64 x 64")
    with pytest.raises(BudgetError, match="needs a budget"):
        make_plan(None, SMALL, Newest(), prompt_tokens=9)


def test_seconds_in_full_detail() -> None:
    plan = split(2 << 20)
    assert plan.frames_in_full == plan.memory_tokens // 16 * 2
    assert plan.seconds_in_full(2) == plan.frames_in_full / 2


def test_other_storage_is_the_memory_s_matter() -> None:
    plan = split(2 << 20)
    for slots in (plan.slots + 100, plan.slots - 100):
        other = replace(plan, budget=None).with_slots(slots)
        assert (other.slots, other.memory_tokens) == (slots, plan.memory_tokens + slots - plan.slots)
        assert other.total_bytes == plan.total_bytes + (slots - plan.slots) * plan.bytes_per_token
    minimum = plan.with_slots(plan.slots - plan.memory_tokens)
    assert (minimum.memory_tokens, minimum.headroom_tokens) == (16, plan.headroom_tokens - 16)


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=60), limit=st.integers(1, 2000), step=st.integers(1, 40))
def test_the_most_that_fits_is_what_counting_up_finds(sizes: list[int], limit: int, step: int) -> None:
    """Also where sizes grow unevenly, and where the first guess was too low."""
    total = list(accumulate(sizes))
    limit = max(limit, total[0])

    def size(slots: int) -> int:
        return total[slots] if slots < len(total) else 10**6 * slots

    assert _most(size, limit, 0, step) == max(slots for slots in range(len(total)) if total[slots] <= limit)


@pytest.mark.parametrize("start", [0, 1, 2, 7, 8, 1000])
def test_the_first_number_that_holds_is_found_wherever_it_is(start: int) -> None:
    for first in (start, start + 1, start + 2, start + 3, start + 9, start + 700):
        assert _first(lambda number, first=first: number >= first, start) == first
