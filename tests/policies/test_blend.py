"""HERMES's blend across layers: what goes from layer to layer, against scores looked up token by token in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, policies
from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer
from millpond.memory.geometry import Geometry
from millpond.ops import dispatch
from millpond.policies.base import SEPARATOR, TEXT, Needs, Policy, View
from millpond.policies.methods.hermes import HERMES
from millpond.policies.methods.mikv import MiKV
from millpond.policies.scoring.matching import match_scores, matching_scratch
from tests.cache.test_pond import Breaks
from tests.policies.test_attention import chosen_by_hermes, hermes_score
from tests.policies.views import rope
from tests.session.measure import transient_peak

GEOMETRY = Geometry(layers=10, kv_heads=2, head_dim=16, dtype=torch.float32, axes=3, kv_groups=2)
ASKED = 5  # the proxy's queries


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "kernels_enabled", False)


def filled(policy: str | Policy = "hermes", geometry: Geometry = GEOMETRY, slots: int = 160, minimum: int = 90) -> Pond:
    """A pond before its first compaction: frames of 3 x 4 and 2 x 3 in turn, each with a separator, and a remembered turn."""
    made = policies.read(policy) if isinstance(policy, str) else policy
    budget = slots * geometry.bytes_per_token + 40_000
    plan = make_plan(budget, geometry, made, prompt_tokens=3, group_tokens=13, reserve_tokens=ASKED, proxy_tokens=ASKED)
    pond = Pond(geometry, plan, made, torch.device("cpu"))
    pond.rope = rope(geometry.head_dim)
    add(pond, torch.full((3, 2), TEXT), 0, prompt=True)
    frame = 0
    while pond.memory_tokens < minimum and pond.overrun(13) <= 0:
        grown(pond, frame)
        frame += 1
    ask(pond)
    return pond


def grown(pond: Pond, frame: int) -> None:
    rows, cols = ((3, 4), (2, 3))[frame % 2]
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    add(pond, torch.cat([grid, torch.full((1, 2), SEPARATOR)]), 10**15 + frame * 500_000)
    if frame == 2:
        add(pond, torch.full((4, 2), TEXT), 10**15 + frame * 500_000)


def add(pond: Pond, grid_position: torch.Tensor, time_us: int, *, prompt: bool = False) -> None:
    count, geometry = len(grid_position), pond.geometry
    random = torch.Generator().manual_seed(time_us % 10**9 + count)
    times, grid_position = torch.full((count,), time_us), grid_position.to(torch.int16)
    serial = int(pond.layers[0].positions[0, pond.length - 1, 0]) + 1 if pond.length else 0
    pond.write_metadata(times, grid_position, torch.arange(serial, serial + count).expand(geometry.axes, -1))
    for layer in range(geometry.layers):
        keys, values = torch.randn(2, 1, geometry.kv_heads, count, geometry.head_dim, generator=random)
        pond.update(keys.to(geometry.dtype) * 2, values.to(geometry.dtype), layer)
    if not prompt:
        pond.commit(times, grid_position)


def ask(pond: Pond) -> None:
    pond.queries.rows.normal_(generator=torch.Generator().manual_seed(pond.compactions))
    pond.queries.counts = [ASKED] * len(pond.layers)


def seen(pond: Pond, slots: int) -> list[View]:
    """Copies of all layers' views before a compaction to `slots`."""
    views = pond.views(slots)
    return [replace(v, **{k: t.clone() for k, t in vars(v).items() if isinstance(t, torch.Tensor)}) for v in views]


def names(view: View, head: int) -> list[tuple[int, int, int]]:
    return [
        (time, *at) for time, at in zip(view.time_us[head].tolist(), view.grid_position[head].tolist(), strict=True)
    ]


def blended(views: list[View], head: int, asked: list[bool]) -> list[torch.Tensor]:
    """For each layer float64 [n]: from the deepest up, looked up by name; what has no place, or is not there, is by itself."""
    out: list[torch.Tensor] = []
    below: dict[tuple[int, int, int], float] = {}
    for view, has_asked in zip(reversed(views), reversed(asked), strict=True):
        mine = names(view, head)
        deeper_scores = torch.tensor([below.get(name, torch.nan) if name[1] >= 0 else torch.nan for name in mine])
        score = hermes_score(view, head, deeper_scores)
        out.insert(0, score)
        below = dict(zip(mine, score.tolist(), strict=True)) if has_asked else {}
    return out


def serials(pond: Pond) -> list[torch.Tensor]:
    """By layer, int32 [H, n]: which tokens live behind the prompt."""
    return [layer.positions[:, pond.plan.prompt_tokens : layer.length, 0].clone() for layer in pond.layers]


def check_pass(pond: Pond, slots: int) -> list[View]:
    """Compact, and compare what stays in every head of every layer with the oracle; returns the views of before."""
    views, before = seen(pond, slots), serials(pond)
    pond.compact(slots)
    after = serials(pond)
    asked = [a.shape[1] < b.shape[1] for a, b in zip(after, before, strict=True)]
    for head in range(GEOMETRY.kv_heads):
        scores = blended(views, head, asked)
        for view, score, was, now in zip(views, scores, before, after, strict=True):
            if now.shape[1] == was.shape[1]:
                continue
            expected = chosen_by_hermes(score, view, head, now.shape[1])
            assert now[head].tolist() == was[head, expected].tolist(), (view.layer, head)
    return views


def test_every_pass_keeps_what_the_blended_scores_say(kernels: None) -> None:
    pond = filled()
    for step in range(4):
        views = check_pass(pond, pond.memory_tokens * 3 // 4)
        if step:
            held = [set(names(view, head)) for view in views for head in range(2)]
            assert len({frozenset(one) for one in held}) > 15, "layers and heads hold different tokens"
        for frame in range(3):
            grown(pond, 1000 + 3 * step + frame)
        ask(pond)
    assert pond.compactions == 4


def test_the_first_pass_is_the_released_one_by_index() -> None:
    """While all layers hold the same tokens, the same index is the same token; only text and separators are not blended here."""
    pond = filled()
    slots = pond.memory_tokens * 2 // 3
    views = seen(pond, slots)
    before = serials(pond)
    pond.compact(slots)
    for head in range(GEOMETRY.kv_heads):
        below = torch.full((views[0].tokens,), torch.nan)
        for view, was, now in zip(reversed(views), reversed(before), reversed(serials(pond)), strict=True):
            below = hermes_score(view, head, below.masked_fill(view.grid_position[head, :, 0] < 0, torch.nan))
            assert now[head].tolist() == was[head, chosen_by_hermes(below, view, head, slots)].tolist()


@dataclass(frozen=True)
class Alone(HERMES):
    """Every layer by itself."""

    def keep(self, view: View, slots: int) -> torch.Tensor:
        return super().keep(replace(view, deeper_scores=None), slots)


def test_the_deeper_score_makes_a_difference_in_every_other_layer() -> None:
    plain, pond = filled(Alone()), filled()
    for one in (plain, pond):
        one.compact(one.memory_tokens // 2)
    differ = [not torch.equal(a, b) for a, b in zip(serials(plain), serials(pond), strict=True)]
    assert differ[-1] is False, "the deepest layer goes by itself"
    assert sum(differ) >= 7


@dataclass(frozen=True)
class Granted(HERMES):
    """Layers with budgets of their own."""

    shares: tuple[float, ...] = ()

    @property
    def needs(self) -> Needs:
        return replace(super().needs, layer_share=2.0)

    def layer_weights(self, views: Iterator[View]) -> list[float]:
        return list(self.shares)


def test_layers_of_different_lengths() -> None:
    pond = filled(Granted(shares=(1, 2, 0.5, 1.5, 1, 0.7, 1.2, 0.4, 1, 0.9)), slots=260)
    for step in range(3):
        check_pass(pond, pond.memory_tokens * 3 // 4)
        assert pond.uneven
        grown(pond, 1000 + step)
        ask(pond)


def test_behind_a_layer_that_keeps_everything_the_blend_begins_anew() -> None:
    pond = filled(Granted(shares=(1, 1, 1, 1, 9, 1, 1, 9, 1, 1)), slots=260)
    before = serials(pond)
    check_pass(pond, pond.memory_tokens * 3 // 4)
    kept = [a.shape == b.shape for a, b in zip(before, serials(pond), strict=True)]
    assert [at for at, whole in enumerate(kept) if whole] == [4, 7]


def test_with_layer_budgets_by_name() -> None:
    pond = filled("hermes+diversity", slots=260)
    for step in range(3):
        check_pass(pond, pond.memory_tokens * 3 // 4)
        grown(pond, 1000 + step)
        ask(pond)


@dataclass(frozen=True)
class Noted(HERMES):
    """Notes what it was shown: layer, tokens, and whether scores came and go."""

    seen: tuple[list[tuple[int, int, bool, bool]], ...] = ()

    def keep(self, view: View, slots: int) -> torch.Tensor:
        self.seen[0].append((view.layer, view.tokens, view.deeper_scores is not None, view.carried_scores is not None))
        return super().keep(view, slots)


def test_packed_tokens_are_chosen_without_the_full_ones_scores() -> None:
    notes: list[tuple[int, int, bool, bool]] = []
    geometry = replace(GEOMETRY, layers=4)
    policy = policies.get("mikv", base=Noted(seen=(notes,), deep=0), bits=8, group=8, full_share=0.4)
    pond = filled(policy, geometry, slots=220, minimum=60)
    for frame in range(60):
        pond.ensure_capacity(13)
        grown(pond, 1000 + frame)
        ask(pond)
    first = pond.layers[0]
    assert isinstance(first, MixedPrecisionLayer)
    assert first.store.groups == first.store.capacity
    notes.clear()
    full = pond.full_precision_tokens
    pond.compact(full - 16)
    assert [note for note in notes if note[1] == full and note[3]] == [(at, full, at < 3, True) for at in (3, 2, 1, 0)]
    assert len(notes) == 8
    assert [note[0] for note in notes if not note[3]] == [3, 2, 1, 0]
    assert not any(note[2] for note in notes if not note[3])


@settings(max_examples=40, deadline=None)
@given(
    times=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6, unique=True),
    cols=st.integers(1, 5),
    shares=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
    seed=st.integers(0, 1000),
)
def test_scores_go_to_the_same_token(times: list[int], cols: int, shares: tuple[float, float], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = torch.tensor(sorted(times)).repeat_interleave(2 * cols + 2)
    corner = 32767 - cols
    grid = [(row, corner + col) for row in (0, 32767) for col in range(cols)]
    where = torch.tensor([*grid[:cols], (SEPARATOR, SEPARATOR), *grid[cols:], (TEXT, TEXT)], dtype=torch.int16)
    where = where.repeat(len(times), 1)

    def held(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        count = max(1, int(share * len(steps)))
        keep = torch.stack([torch.randperm(len(steps), generator=random)[:count].sort().values for _ in range(2)])
        return steps[keep], where[keep]

    (time_us, grid_position), (to_time_us, to_place) = held(shares[0]), held(shares[1])
    scores = torch.rand(time_us.shape, generator=random)
    out = match_scores(scores, time_us, grid_position, to_time_us, to_place)
    assert out.shape == to_time_us.shape
    for head in range(2):
        rows = zip(time_us[head].tolist(), grid_position[head].tolist(), scores[head].tolist(), strict=True)
        known = {(time, *at): score for time, at, score in rows if at[0] >= 0}
        for time, at, got in zip(to_time_us[head].tolist(), to_place[head].tolist(), out[head].tolist(), strict=True):
            assert known.get((time, *at)) == (None if got != got else got)


@pytest.mark.parametrize("count", [1, 7, 300, 6000, 50_000])
def test_scratch_of_matching_is_bounded(count: int) -> None:
    time_us = torch.arange(count).repeat(3, 1)
    grid_position = torch.zeros(3, count, 2, dtype=torch.int16)
    scores = torch.rand(3, count)
    peak = transient_peak(lambda: match_scores(scores, time_us, grid_position, time_us, grid_position))
    assert 4 * 3 * count < peak <= matching_scratch(count) + 4 * 3 * count


@pytest.mark.parametrize("policy", ["hermes", "hermes+diversity", MiKV(base=HERMES(deep=0), group=8, full_share=0.4)])
@pytest.mark.parametrize("shape", [(4, 1, 16), (4, 4, 64)])
def test_a_pass_stays_within_the_scratch_of_the_plan(policy: str | Policy, shape: tuple[int, int, int]) -> None:
    geometry = Geometry(*shape, torch.bfloat16, axes=3, kv_groups=2)
    pond = filled(policy, geometry, slots=400, minimum=1000)
    assert pond.overrun(13) > 0
    for less in (9, 20, 40):
        slots = pond.full_precision_tokens - less
        assert 0 < transient_peak(lambda slots=slots: pond.compact(slots)) <= pond.plan.scratch_bytes
        ask(pond)
    assert pond.compactions == 3
    assert pond.ledger.peak <= (pond.plan.budget or 0)


@dataclass(frozen=True)
class BreaksUpwards(Breaks):
    needs: ClassVar[Needs] = Needs(deeper_scores=True)


@pytest.mark.parametrize("layer", range(4))
def test_a_policy_that_fails_on_the_way_up_leaves_the_memory_untouched(layer: int) -> None:
    pond = filled(BreaksUpwards(layer=layer), replace(GEOMETRY, layers=4))
    before, slots = serials(pond), pond.memory_tokens // 2
    with pytest.raises(PolicyError, match="on purpose"):
        pond.compact(slots)
    assert all(torch.equal(now, was) for now, was in zip(serials(pond), before, strict=True))
    assert pond.compactions == 0
