"""What goes with what: whatever the table does not refuse works, and a wrapper hands on all that it does not add."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from millpond import PolicyError, PondCache, Session, policies
from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.host import HostCache
from millpond.cache.storage.arena import ArenaStorage
from millpond.kv_quantization.quantizer import KVQuantizer
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.policies import composition
from millpond.policies.allocators.diversity import Diversity
from millpond.policies.base import Needs, Policy, Scorer, Shape, View
from millpond.policies.composition import REFUSED, Wrapper, check, features
from millpond.policies.layered import Layered
from millpond.policies.methods.mikv import MiKV
from tests.cache.text_model import text_model
from tests.models.tiny import tiny
from tests.policies.views import grid_view, rope
from tests.session.frames import moving
from tests.session.measure import held_bytes

TIER = QuantizedTier(KVQuantizer(4, 4), 0.5)
NEEDS = {
    composition.QUERIES: {"proxy": "latest", "queries": 4},
    composition.ACCUMULATED: {"accumulated_attention": True},
    composition.DEEPER: {"deeper_scores": True},
    composition.MERGING: {"merging": True},
    composition.POSITIONS: {"positions": True},
    composition.WHOLE_FRAMES: {"whole_frames": True},
    composition.RETRIEVAL: {"retrieved_frames": 2},
    composition.QUANTIZED_TIER: {"quantized_tier": TIER},
    composition.LAYER_BUDGETS: {"layer_share": 2.0},
}
WRAPPERS = ("mikv", "+diversity", "+cake")
REFUSED_BY_NAME = {
    "mikv": {"full", "hermes", "infinipot-v-released", "infinite-vggt", "kvmerger", "mikv", "rekv", "streammem"},
    "+diversity": {"full", "infinipot-v-released", "infinite-vggt", "mikv", "rekv"},
    "+cake": {"full", "infinipot-v-released", "infinite-vggt", "mikv", "rekv"},
}


def wrapped(wrapper: str, name: str) -> Policy:
    if wrapper == "mikv":
        return policies.read(f"mikv:bits=2:group=8:full_share=0.4:base={name}")
    return policies.read(f"{name}{wrapper}")


@pytest.mark.parametrize("name", [policy.name for policy in policies.available()])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_around_every_policy_works_or_is_refused_in_one_line(
    wrapper: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in REFUSED_BY_NAME[wrapper]:
        with pytest.raises(PolicyError, match=r"do not go together: |already") as caught:
            wrapped(wrapper, name)
        assert f"around {name!r}" in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    policy = wrapped(wrapper, name)
    assert isinstance(policy, Wrapper)
    merged: list[int] = []
    inner, plain = type(policy.inner), type(policy.inner).merge
    monkeypatch.setattr(inner, "merge", lambda self, view, keep: (merged.append(view.layer), plain(self, view, keep)))
    family = tiny("qwen2_5_vl")
    session = Session(family, budget=130 * family.geometry.bytes_per_token + 130_000, policy=policy)
    session.feed(list(moving(30)))
    pond = session._runner.pond
    assert pond.evicted > 0
    assert (pond.quantized_tokens > 0) == (wrapper == "mikv")
    assert isinstance(pond.storage, ArenaStorage) == (wrapper != "mikv")
    assert bool(merged) == policy.inner.needs.merging
    assert held_bytes(session) <= session.usage.peak_bytes <= session.plan.budget


@dataclass(frozen=True)
class Made(Scorer):
    """Needs what it is told to, and notes what it was given of it."""

    name: ClassVar[str] = "made"
    source: ClassVar[str] = "this test"
    wants: Needs = Needs()  # noqa: RUF009
    given: set[str] = field(default_factory=set)

    @property
    def needs(self) -> Needs:
        return self.wants

    def score(self, view: View) -> torch.Tensor:
        shown = {
            composition.QUERIES: view.queries,
            composition.ACCUMULATED: view.accumulated_attention,
            composition.DEEPER: view.carried_scores,
            composition.POSITIONS: view.rope,
        }
        self.given.update(name for name, tensor in shown.items() if tensor is not None)
        return torch.arange(view.tokens).float().repeat(view.heads, 1)

    def keep(self, view: View, slots: int) -> torch.Tensor:
        assert not self.wants.whole_frames or slots % view.block == 0
        return super().keep(view, slots)

    def merge(self, view: View, keep: torch.Tensor) -> None:
        self.given.add(composition.MERGING)

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        return [1.0 + view.layer for view in views]


def carry_a_stream(policy: Made) -> Pond:
    geometry = Geometry(2, 2, 8, torch.float32, axes=3)
    numbers = {"prompt_tokens": 2, "group_tokens": 6, "reserve_tokens": 4}
    plan = make_plan(120 * geometry.bytes_per_token + 30_000, geometry, policy, **numbers)
    pond = Pond(geometry, plan, policy, torch.device("cpu"))
    pond.rope = rope(8)
    pond.queries.counts = [pond.queries.rows.shape[-2]] * 2
    if policy.needs.retrieved_frames:
        pond.host = HostCache(geometry, pond.rope, 1 << 20)
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(3)).to(torch.int16)
    for frame in range(-1, 60):
        grid_position = cells if frame >= 0 else torch.full((2, 2), -1, dtype=torch.int16)
        times = torch.full((len(grid_position),), frame)
        if frame >= 0:
            pond.ensure_capacity(len(grid_position))
        pond.write_metadata(times, grid_position, times.expand(3, -1))
        for layer in range(2):
            pond.update(torch.randn(1, 2, len(grid_position), 8), torch.randn(1, 2, len(grid_position), 8), layer)
        if frame >= 0:
            pond.commit(times, grid_position)
    return pond


@pytest.mark.parametrize("pair", [*combinations(NEEDS, 2)], ids="-".join)
def test_any_two_needs_are_met_together_or_refused(pair: tuple[str, str]) -> None:
    policy = Made(Needs(**NEEDS[pair[0]], **NEEDS[pair[1]]))
    assert set(pair) <= set(features(policy))
    if why := REFUSED.get(pair) or REFUSED.get(pair[::-1]):
        with pytest.raises(PolicyError, match=f"^the policy 'made': .* do not go together: {why}$"):
            check(policy)
        return
    check(policy)
    pond = carry_a_stream(policy)
    assert pond.compactions > 2
    for name in pair:
        if name == composition.QUANTIZED_TIER:
            assert pond.quantized_tokens > 0
        elif name == composition.LAYER_BUDGETS:
            assert pond.uneven
        elif name == composition.RETRIEVAL:
            assert pond.host is not None
            assert pond.host.frames > 0
        elif name == composition.WHOLE_FRAMES:
            assert pond.plan.memory_tokens % 6 == 0
        else:
            assert name in policy.given


def test_a_pair_that_does_not_go_is_refused_wherever_a_policy_is_used() -> None:
    odd = Made(Needs(quantized_tier=TIER, layer_share=2.0))
    for use in (lambda: Session(tiny("qwen2_5_vl"), budget="1MiB", policy=odd), lambda: carry_a_stream(odd)):
        with pytest.raises(PolicyError, match="a quantized tier and layer budgets do not go together"):
            use()


def test_every_line_of_the_table_names_what_there_is() -> None:
    known = {value for name, value in vars(composition).items() if name.isupper() and isinstance(value, str)}
    assert {name for pair in REFUSED for name in pair} <= known
    assert all((other, one) not in REFUSED for one, other in REFUSED)


@dataclass(frozen=True)
class MoreNeeds(Needs):
    """With a capability that no wrapper has heard of."""

    unheard_of: int = 0


WRAPPED_NEEDS = {
    "proxy": "prompt",
    "queries": 5,
    "accumulated_attention": True,
    "deeper_scores": True,
    "merging": True,
    "positions": True,
    "whole_frames": True,
    "retrieved_frames": 3,
    "quantized_tier": TIER,
    "layer_share": 1.5,
    "unheard_of": 7,
}


@pytest.mark.parametrize("kind", ["mikv", "layered"])
def test_a_wrapper_hands_on_every_need_but_the_one_that_it_adds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that do not go with it: the table is what refuses, not the wrapper."""
    monkeypatch.setattr(Wrapper, "__post_init__", lambda self: None)
    assert set(WRAPPED_NEEDS) == {one.name for one in fields(MoreNeeds)}
    inner = Made(MoreNeeds(**WRAPPED_NEEDS))
    wrapper = MiKV(base=inner) if kind == "mikv" else Layered(inner, Diversity())
    added = {"quantized_tier": MiKV().tier} if kind == "mikv" else {"layer_share": 2.0}
    assert wrapper.needs == replace(inner.needs, **added)


@pytest.mark.parametrize("kind", [MiKV, Layered])
def test_a_wrapper_hands_on_every_member_of_a_policy_that_it_does_not_override(
    kind: type[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Everything(Made):
        agnostic, capped = False, True

    inner = Everything()
    wrapper = MiKV(base=inner) if kind is MiKV else Layered(inner, Diversity())
    members = {name for name in vars(Policy) if not name.startswith("_")}
    assert members >= {"keep", "merge", "needs", "recent", "minimum_memory", "scratch", "layer_weights", "agnostic"}
    for name in members - {"keep", *vars(kind)}:
        monkeypatch.setattr(Everything, name, f"the inner {name}")
        assert getattr(wrapper, name) == f"the inner {name}"
        assert getattr(kind, name) == getattr(Policy, name), "on the class what the base has"
    view = grid_view(6, 2, 2)
    assert torch.equal(wrapper.keep(view, 9), inner.keep(view, 9))
    assert "keep" not in vars(kind)
    shape = Shape(2, 40, 8, 4, 16)
    assert Layered(Made(), Diversity()).scratch(shape) == max(Made().scratch(shape), Diversity().scratch(shape))


def test_the_tables_in_the_docs_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies" / "combinations.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    rows = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines]
    assert [row for row in rows if len(row) == 3][1:] == [(*pair, why) for pair, why in REFUSED.items()]
    model = text_model()

    def goes(make: Callable[[], object]) -> str:
        try:
            make()
        except PolicyError:
            return "no"
        return "yes"

    expected = [
        (
            kind.name,
            *(goes(partial(wrapped, wrapper, kind.name)) for wrapper in WRAPPERS),
            goes(partial(PondCache, model, "1MiB" if kind.capped else None, kind.name)),
        )
        for kind in policies.available()
        if kind.__module__.startswith("millpond.")
    ]
    assert [row for row in rows if len(row) == 5][1:] == expected
