"""The pond alone: append, compaction, rollback, protection and books, against plain tensors."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.errors import BudgetError, ModelError, PolicyError
from millpond.memory.geometry import Geometry
from millpond.policies.base import TEXT, Needs, Policy
from tests.cache.text_model import Newest, Scattered

GEOMETRY = Geometry(layers=3, kv_heads=2, head_dim=8, dtype=torch.float32, axes=3)
GROUP = 6


def pond(slots_bytes: int = 120, policy: Policy | None = None, geometry: Geometry = GEOMETRY, **plan: int) -> Pond:
    chosen = policy or Scattered()
    numbers = {"prompt_tokens": 3, "group_tokens": GROUP, "frames_per_group": 1, "reserve_tokens": 5} | plan
    return Pond(
        geometry,
        make_plan(slots_bytes * geometry.bytes_per_token, geometry, chosen, **numbers),
        chosen,
        torch.device("cpu"),
    )


def copied(source: Pond) -> Pond:
    """A pond of the same kind, made from the state of another."""
    other = Pond(source.geometry, source.plan, source.policy, source.device)
    other.restore(source.state())
    return other


class Stream:
    """Feeds random tokens and keeps an independent record of everything that ever went in."""

    def __init__(self, target: Pond, seed: int = 0) -> None:
        self.pond, self.random = target, torch.Generator().manual_seed(seed)
        self.record: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.serial = 0

    def add(self, count: int, time_us: int, grid_position: torch.Tensor | None = None, *, prompt: bool = False) -> None:
        geometry = self.pond.geometry
        self.pond.ensure_capacity(count)
        if grid_position is None:
            grid_position = torch.stack([torch.zeros(count), torch.arange(count)], dim=1).to(torch.int16)
        times = torch.full((count,), time_us, dtype=torch.int64)
        # The serial number rides in the positions, so that a survivor says which token it is.
        serials = torch.arange(self.serial, self.serial + count)
        self.pond.write_metadata(times, grid_position, serials.expand(geometry.axes, -1))
        for layer in range(geometry.layers):
            shape = (1, geometry.kv_heads, count, geometry.head_dim)
            keys, values = (torch.randn(shape, generator=self.random).to(geometry.dtype) for _ in range(2))
            for head in range(geometry.kv_heads):
                for n in range(count):
                    self.record[layer, head, self.serial + n] = (keys[0, head, n], values[0, head, n])
            got_keys, got_values = self.pond.update(keys, values, layer)
            assert torch.equal(got_keys[:, :, -count:], keys)
            assert got_keys.shape[2] == got_values.shape[2] == self.pond.layers[layer].get_seq_length()
        if not prompt:
            self.pond.commit(times, grid_position)
        self.serial += count

    def check(self) -> list[list[list[int]]]:
        """Every stored key and value is the one that went in under its serial number; returns serials by layer and head."""
        kept = []
        for index, layer in enumerate(self.pond.layers):
            kept.append([])
            for head in range(layer.keys.shape[1]):
                serials = layer.positions[head, : layer.length, 0].tolist()
                assert serials == sorted(set(serials))
                for slot, serial in enumerate(serials):
                    keys, values = self.record[index, head, serial]
                    assert torch.equal(layer.keys[0, head, slot], keys)
                    assert torch.equal(layer.values[0, head, slot], values)
                kept[-1].append(serials)
        return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_compactions_move_the_right_bytes_and_keep_prompt_and_recent(dtype: torch.dtype) -> None:
    target = pond(geometry=replace(GEOMETRY, dtype=dtype))
    stream = Stream(target)
    stream.add(3, 0, torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)
    storages = [t.data_ptr() for layer in target.layers for t in layer.tensors()]
    for frame in range(60):
        stream.add(GROUP, frame * 500_000)
        kept = stream.check()
        latest = set(range(stream.serial - GROUP, stream.serial))
        for heads in kept:
            for serials in heads:
                assert serials[:3] == [0, 1, 2]
                assert latest <= set(serials)
        assert target.free >= target.plan.reserve_tokens
    assert target.compactions > 5
    assert len({tuple(serials) for heads in kept for serials in heads}) == 6  # every head kept something else
    assert storages == [t.data_ptr() for layer in target.layers for t in layer.tensors()], "storage is allocated once"


def test_the_protected_frames_are_the_policys_quarter() -> None:
    target = pond(slots_bytes=140)
    stream = Stream(target)
    stream.add(3, 0, torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)
    compactions = 0
    for frame in range(80):
        stream.add(GROUP, frame)
        if target.compactions > compactions:
            compactions = target.compactions
            frames = (target.plan.memory_tokens + target.plan.headroom_tokens) // GROUP
            recent = max(1, int(0.25 * (frames - 1)))
            newest = set(range(stream.serial - GROUP * (recent + 1), stream.serial))
            for heads in stream.check():
                for serials in heads:
                    assert newest <= set(serials)
    assert compactions > 3


def test_text_of_turns_is_protected_up_to_a_share_and_then_forgotten() -> None:
    target = pond(slots_bytes=140)
    stream = Stream(target)
    stream.add(3, 0, torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)
    said: list[int] = []
    for turn in range(12):
        for frame in range(4):
            stream.add(GROUP, turn * 100 + frame)
        first = stream.serial
        stream.add(4, turn * 100 + 50, torch.full((4, 2), TEXT, dtype=torch.int16))
        said += range(first, stream.serial)
        text_share = target.plan.memory_tokens // 4
        for heads in stream.check():
            for serials in heads:
                assert set(said[-text_share:]) <= set(serials)
    assert len(said) > text_share
    oldest = set(said[: -2 * text_share])
    assert any(not oldest <= set(serials) for heads in stream.check() for serials in heads)


def test_a_block_that_cannot_fit_is_refused_and_nothing_is_forgotten() -> None:
    target = pond()
    stream = Stream(target)
    stream.add(3, 0, prompt=True)
    stream.add(GROUP, 1)
    before = stream.check()
    with pytest.raises(BudgetError) as caught:
        target.ensure_capacity(10_000)
    assert caught.value.minimum is not None
    assert caught.value.minimum > target.plan.budget
    assert stream.check() == before
    with pytest.raises(BudgetError):
        target.ensure_turn_capacity(10_000)
    assert stream.check() == before


def test_truncate_rolls_a_turn_back() -> None:
    target = pond()
    stream = Stream(target)
    stream.add(3, 0, prompt=True)
    stream.add(GROUP, 1)
    before = [t[:, : target.length].clone() for layer in target.layers for t in layer.tensors()]
    mark = target.length
    stream.add(5, 2, torch.full((5, 2), TEXT, dtype=torch.int16))
    target.truncate(mark)
    after = [t[:, :mark] for layer in target.layers for t in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True)
class Breaks(Newest):
    """Fails in one layer in a chosen way."""

    name: ClassVar[str] = "breaks"
    layer: int = 0
    how: str = "raise"

    def keep(self, view, slots):  # type: ignore[no-untyped-def]
        good = super().keep(view, slots)
        if view.layer != self.layer:
            return good
        if self.how == "raise":
            raise PolicyError("on purpose")
        if self.how == "short":
            return good[:, :-1]
        if self.how == "repeat":
            return good.clamp(max=int(good[0, -2]))
        if self.how == "outside":
            return good + view.tokens
        return torch.arange(slots).repeat(view.heads, 1)  # drops what is protected


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("how", ["raise", "short", "repeat", "outside", "unprotected"])
def test_a_policy_that_breaks_its_contract_is_an_error_and_the_memory_stays_untouched(layer: int, how: str) -> None:
    target = pond(policy=Breaks(layer=layer, how=how))
    stream = Stream(target)
    stream.add(3, 0, prompt=True)
    while target.overrun(GROUP) <= 0:
        stream.add(GROUP, stream.serial)
    with pytest.raises(PolicyError):
        target.ensure_capacity(GROUP)
    assert (target.compactions, target.evicted) == (0, 0)
    assert all(serials == list(range(stream.serial)) for heads in stream.check() for serials in heads)


@dataclass(frozen=True)
class Unmerged(Newest):
    """Fails in every merge."""

    name: ClassVar[str] = "unmerged"
    needs: ClassVar[Needs] = Needs(merging=True)

    def merge(self, view, keep):  # type: ignore[no-untyped-def]
        raise PolicyError("on purpose")


def test_a_policy_that_cannot_merge_is_an_error_and_the_pass_is_finished_without() -> None:
    target = pond(policy=Unmerged())
    stream = Stream(target)
    stream.add(3, 0, prompt=True)
    while target.overrun(GROUP) <= 0:
        stream.add(GROUP, stream.serial)
    with pytest.raises(PolicyError, match="on purpose"):
        target.ensure_capacity(GROUP)
    assert target.compactions == 1
    kept = list(range(3)) + list(range(stream.serial - target.memory_tokens, stream.serial))
    assert all(serials == kept for heads in stream.check() for serials in heads)
    stream.add(GROUP, stream.serial)  # there is room now, and nothing is left to be finished


def test_fork_is_a_copy() -> None:
    target = pond()
    stream = Stream(target)
    stream.add(3, 0, prompt=True)
    for frame in range(20):
        stream.add(GROUP, frame)
    other = copied(target)
    before = stream.check()
    fork = Stream(other, seed=9)
    fork.record, fork.serial = dict(stream.record), stream.serial
    for frame in range(20, 40):
        fork.add(GROUP, frame)
    fork.check()
    assert stream.check() == before
    assert {t.untyped_storage().data_ptr() for layer in target.layers for t in layer.tensors()}.isdisjoint(
        t.untyped_storage().data_ptr() for layer in other.layers for t in layer.tensors()
    )


@settings(max_examples=25, deadline=None)
@given(
    budgets=st.lists(st.integers(60, 400), min_size=1, max_size=6),
    frames=st.integers(1, 25),
    layers=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_resize_keeps_the_books_the_cap_and_the_bytes(budgets: list[int], frames: int, layers: int, seed: int) -> None:
    geometry = replace(GEOMETRY, layers=layers, head_dim=64)  # wide heads: a tensor is larger than the scratch
    target = pond(slots_bytes=200, geometry=geometry)
    stream = Stream(target, seed)
    stream.add(3, 0, prompt=True)
    time = 0
    for size in budgets:
        for _ in range(frames):
            time += 1
            stream.add(GROUP, time)
        old = target.plan.budget
        plan = make_plan(
            size * geometry.bytes_per_token,
            geometry,
            target.policy,
            prompt_tokens=3,
            group_tokens=GROUP,
            reserve_tokens=5,
        )
        target.ledger.peak = 0
        target.resize(plan)
        assert target.ledger.peak <= max(old, plan.budget)
        assert target.ledger.limit == plan.budget
        assert target.storage.nbytes == target.ledger.account("storage") <= plan.budget
        assert target.free >= target.plan.reserve_tokens
        kept = stream.check()
        assert all(serials[:3] == [0, 1, 2] for heads in kept for serials in heads)


def test_what_a_layer_refuses() -> None:
    target = pond()
    good = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match="batch"):
        target.update(good.repeat(2, 1, 1, 1), good.repeat(2, 1, 1, 1), 0)
    with pytest.raises(ModelError, match="made for"):
        target.update(good.half(), good.half(), 0)
    with pytest.raises(ModelError, match="made for"):
        target.update(good[..., :4], good[..., :4], 0)
    with pytest.raises(BudgetError, match="free slots"):
        target.update(torch.zeros(1, 2, 999, 8), torch.zeros(1, 2, 999, 8), 0)
    with pytest.raises(ModelError, match="beam"):
        target.layers[0].reorder_cache(torch.zeros(1))
