"""What every entry of a pond does first, which storage a policy gets, and the small sums that others rely on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from millpond import PondCache
from millpond.cache import Pond, resize
from millpond.cache.consumers import make_plan
from millpond.cache.recent import Protected, RecentWindow
from millpond.cache.storage.arena import ArenaStorage
from millpond.cache.storage.base import PerLayerStorage
from millpond.cache.storage.mixed_precision import MixedPrecisionStorage
from millpond.errors import BudgetError, MillpondError
from millpond.memory.geometry import Geometry
from millpond.policies.base import SEPARATOR, TEXT
from millpond.policies.methods.mikv import MiKV
from millpond.policies.registry import read
from tests.cache.test_pond import GROUP, Stream, pond
from tests.cache.text_model import Newest, Scattered, text_model
from tests.session.test_layer_budgets import layered

ENTRIES: dict[str, Callable[[Pond], Any]] = {
    "overrun": lambda pond: pond.overrun(1),
    "ensure_capacity": lambda pond: pond.ensure_capacity(1),
    "ensure_turn_capacity": lambda pond: pond.ensure_turn_capacity(1),
    "write_metadata": lambda pond: pond.write_metadata(*[torch.zeros(0, 2)] * 3),
    "truncate": lambda pond: pond.truncate(3),
    "cut": lambda pond: pond.cut(3, 0),
    "mark": lambda pond: pond.mark(),
    "compact": lambda pond: pond.compact(50),
    "forget_quantized": lambda pond: pond.forget_quantized(0),
    "views": lambda pond: pond.views(50),
    "kept": lambda pond: pond.kept(),
    "usage": lambda pond: pond.usage(),
    "resize": lambda pond: pond.resize(pond.plan),
    "state": lambda pond: pond.state(),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_finishes_a_move_that_was_interrupted_before_it_does_anything(name: str) -> None:
    class Stuck:
        def run(self) -> None:
            raise MemoryError("none")

    target = pond(policy=Newest())
    Stream(target).add(3, 0, torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)
    target._move = Stuck()
    with pytest.raises(MillpondError, match=r"interrupted while it moved, and going on fails \(none\)"):
        ENTRIES[name](target)
    assert target.moving


def test_the_storage_is_of_the_kind_that_the_policy_needs() -> None:
    assert type(pond(policy=Scattered()).storage) is PerLayerStorage
    assert type(pond(policy=layered("random", 0.6, 1.4)).storage) is ArenaStorage
    packed = pond(slots_bytes=220, policy=MiKV(bits=4, group=8, full_share=0.5, base=Scattered()))
    assert type(packed.storage) is MixedPrecisionStorage


def test_a_refusal_names_a_budget_that_carries_the_block() -> None:
    small = pond(slots_bytes=80, policy=Newest())
    Stream(small).add(3, 0, torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)
    with pytest.raises(BudgetError, match=r"a block of 200 tokens does not fit .* about \d+ would do") as caught:
        small.ensure_capacity(200)
    assert caught.value.minimum is not None
    more = caught.value.minimum - small.plan.budget
    assert more == (200 + 3 + GROUP + 5 - small.plan.slots) * small.plan.bytes_per_token
    with pytest.raises(BudgetError, match=r"a turn of 90 tokens \(\d+ slots are free\)") as caught:
        small.ensure_turn_capacity(90)
    assert caught.value.minimum == small.plan.budget + (3 + 90 + 5 - small.plan.slots) * small.plan.bytes_per_token
    small.ensure_turn_capacity(small.free)


def test_the_most_that_can_be_kept_on_the_way_is_found_by_halving(monkeypatch: pytest.MonkeyPatch) -> None:
    target = pond(slots_bytes=120)
    new = replace(target.plan, budget=None).with_slots(90)
    asked: list[int] = []
    fitting = [0]

    def fits(slabs: int, held: int, limit: int | None) -> bool:
        asked.append(slabs)
        return slabs <= fitting[-1]

    monkeypatch.setattr(resize, "_slabs", lambda storage, plan, length: length)
    monkeypatch.setattr(resize, "feasible", fits)
    room = min(new.memory_tokens, new.slots - new.reserve_tokens - 3)
    for fitting[-1], kept in ((1000, room), (3 + 17, 17), (3 + 1, 1), (3 + room, room), (3 + room - 1, room - 1)):
        assert resize.most_tokens(target.storage, target.ledger, target.plan, new, None) == kept
    assert all(3 < length <= 3 + room for length in asked)
    fitting[-1] = 3
    with pytest.raises(BudgetError, match="cannot shrink to 90 slots"):
        resize.most_tokens(target.storage, target.ledger, target.plan, new, None)


def test_the_newest_groups_and_texts_are_protected_as_far_as_they_fit() -> None:
    places = torch.zeros(6, 2, dtype=torch.int16)
    window = RecentWindow()
    assert window.group_tokens is None
    for time in (5, 6, 7, 8):
        window = window.with_block(torch.full((6,), time), places, slots=30)
    assert window.groups == ((5, 6), (6, 6), (7, 6), (8, 6))
    window = window.with_block(torch.tensor([8, 8, 9, 9, 9]), places[:5], slots=20)
    assert window.groups == ((6, 6), (7, 6), (8, 8), (9, 3)), "what 20 slots could never hold is forgotten"
    assert window.group_tokens == 3
    held: list[int] = []

    def latest(frames: int) -> int:
        held.append(frames)
        return 2

    assert window.protect(2, 17, latest) == Protected(8, None)
    assert window.protect(31, 17, latest) == Protected(8, None)
    assert held == [1, 10], "groups of the latest size that are in memory, at least one"
    assert window.protect(31, 10, latest) == Protected(9, None)
    since = [window.protect(31, slots, lambda frames: 9).since_us for slots in (16, 17, 22, 23)]
    assert since == [8, 7, 7, 6], "whole groups, to the last slot"
    assert window.protect(31, 17, lambda frames: 0).since_us == 9, "the latest group always"
    assert window.protect(31, 2, latest).since_us == 10, "not even the latest fits"
    said = window.with_block(torch.full((9,), 11), torch.full((9, 2), TEXT, dtype=torch.int16), slots=20)
    assert (said.groups, said.text) == (window.groups, 9)
    assert said.protect(31, 16, latest) == Protected(8, 4), "text has a quarter of the slots"
    assert said.protect(31, 14, lambda frames: 9) == Protected(8, 3), "and 8 + 3 + 3 are 14"
    assert said.without_text(2).text == 7
    assert said.compacted(Protected(8, 4)) == RecentWindow(((8, 8), (9, 3)), 4)
    assert RecentWindow().protect(9, 4, latest) == Protected(torch.iinfo(torch.int64).max, None)


def test_protection_goes_by_time_for_frames_and_by_rank_for_text() -> None:
    places = torch.zeros(1, 6, 2, dtype=torch.int16)
    places[0, 1:4] = TEXT
    places[0, 5] = SEPARATOR
    times = torch.tensor([[1, 2, 2, 2, 3, 4]])
    assert Protected(3, 2).mask(times, places).tolist() == [[False, False, True, True, True, True]]
    assert Protected(1, 0).mask(times, places).tolist() == [[True, False, False, False, True, True]]
    assert Protected(2, None).mask(times, places).tolist() == [[False, True, True, True, True, True]]


def test_a_generator_asks_where_the_cache_stands() -> None:
    model = text_model()
    policy = MiKV(bits=4, group=8, full_share=0.5, base=Newest())
    cache = PondCache(model, 90_000, policy)
    with torch.inference_mode():
        for start in range(0, 400, 8):
            model(torch.arange(start, start + 8)[None] % 97, past_key_values=cache)
    assert cache.quantized_tokens > 0
    assert cache.get_query_offset() == cache.quantized_tokens + cache.length
    assert cache.get_seq_length() == 400


def test_what_a_question_works_on_can_be_the_most() -> None:
    """A model of many query heads: the mean query outweighs a compaction of few tokens."""
    geometry = Geometry(layers=1, kv_heads=2, head_dim=64, dtype=torch.float16, axes=3, kv_groups=200)
    plan = make_plan(600_000, geometry, read("rekv:frames=2"), prompt_tokens=3, group_tokens=2)
    rows = plan.chunk
    piece = rows * (2 * 128 + 8 * 64) + rows * 52 * 64 // 2
    tokens = plan.slots - 3
    best, query = 40 * (plan.retrieved_tokens + plan.chunk), 16 * 200 * 2 * 64
    assert plan.scratch_bytes == piece + best + query + 10 * tokens


def test_lines_say_what_they_are_for() -> None:
    geometry = Geometry(layers=2, kv_heads=2, head_dim=16, dtype=torch.float32)
    plan = make_plan(1 << 20, geometry, read("rekv:frames=3"), prompt_tokens=3, group_tokens=5, frames_per_group=2)
    assert {line.name: line.purpose for line in plan.lines} == {
        "prompt": "pinned",
        "memory": "what a compaction keeps, |C|",
        "headroom": "blocks of 20 tokens (8 frames)",
        "turn": "a question and its answer",
        "retrieved frames": "6 frames that a question brings back from host memory",
        "quantized store": "0 tokens remembered in few bits",
        "dequantization buffer": "where one layer is dequantized",
        "scratch": "compaction and re-anchoring",
        "queries": "the policy's proxy",
        "undo": "what a block could have to put back",
    }
    assert plan.retrieved_frames == 3
    assert plan.block_tokens == 20
    assert plan.seconds_in_full(4) == plan.memory_tokens // 5 * 2 / 4
