"""InfiniPot-V against brute force in float64, in the first pass and after several, and against its released form."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, policies
from millpond.ops import dispatch
from millpond.ops.infinipot_v import pool_over_grid, pooling_kernel, temporal_redundancy, value_norms
from millpond.policies.base import TEXT, View
from millpond.policies.methods.infinipot_v import InfiniPotV
from tests.policies.views import grid_view, joined, thinned, with_text


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "kernels_enabled", False)
    return request.param


def redundancy(view: View) -> torch.Tensor:
    return temporal_redundancy(view.keys, view.grid_position, view.protected, view.chunk, max(view.block, view.chunk))


def tar(view: View) -> list[list[float]]:
    """The paper's sum, token by token and recent frame by recent frame, in float64."""
    out = []
    for head in range(view.heads):
        keys = view.keys[head].double()
        row = []
        for n in range(view.tokens):
            if view.protected[head, n] or view.grid_position[head, n, 0] < 0:
                row.append(-torch.inf)
                continue
            same = [
                torch.nn.functional.cosine_similarity(keys[n], keys[m], dim=0).item()
                for m in range(view.tokens)
                if view.protected[head, m] and torch.equal(view.grid_position[head, m], view.grid_position[head, n])
            ]
            row.append(-sum(same) / len(same) if same else 0.0)
        out.append(row)
    return out


def van(view: View, kernel: int) -> list[list[float]]:
    """Value norms averaged over the tokens that exist in the window, in float64."""
    out = []
    for head in range(view.heads):
        norms = view.values[head].double().norm(dim=-1)
        row = []
        for n in range(view.tokens):
            grid_position = view.grid_position[head, n]
            if grid_position[0] < 0:
                row.append(norms[n].item())
                continue
            near = [
                norms[m].item()
                for m in range(view.tokens)
                if view.time_us[head, m] == view.time_us[head, n]
                and view.grid_position[head, m, 0] >= 0
                and int((view.grid_position[head, m] - grid_position).abs().max()) <= kernel // 2
            ]
            row.append(sum(near) / len(near))
        out.append(row)
    return out


@cache
def views() -> list[View]:
    first = grid_view(7, 3, 4, recent=2)
    second = thinned(first, policies.get("random").keep(first, 50), 2)
    # Recent frames of several shapes: their places do not fit into one table of `chunk` places.
    tall = joined(grid_view(3, 2, 5), joined(grid_view(2, 7, 1, recent=2), grid_view(2, 2, 6, recent=2)))
    # In one head nearly everything old is text: it has fewer placed tokens than TaR could take.
    grid_position = first.grid_position.clone()
    grid_position[1, 2:58] = TEXT
    return [
        first,
        second,
        with_text(second),
        joined(grid_view(3, 2, 5), grid_view(4, 3, 3, recent=2)),
        grid_view(5, 1, 1),
        replace(tall, chunk=4, block=3),
        replace(first, grid_position=grid_position),
    ]


@cache
def tar_of(which: int) -> list[list[float]]:
    return tar(views()[which])


@cache
def van_of(which: int, kernel: int) -> list[list[float]]:
    return van(views()[which], kernel)


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_redundancy_equals_the_papers_sum(which: int, dtype: torch.dtype) -> None:
    view = views()[which]
    view = replace(view, keys=view.keys.to(dtype))
    assert torch.allclose(redundancy(view).double(), torch.tensor(tar(view)).double(), atol=1e-5)


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_pooling_counts_neither_padding_nor_holes(which: int, kernel: int) -> None:
    view = views()[which]
    norms = value_norms(view.values, view.chunk)
    pool_over_grid(norms, view.time_us, view.grid_position, kernel, view.chunk)
    assert torch.allclose(norms.double(), torch.tensor(van_of(which, kernel)).double(), rtol=1e-5)


def test_an_even_frame_stays_even_under_pooling_also_at_its_corners() -> None:
    view = grid_view(2, 5, 5)
    norms = torch.full((2, 50), 3.0)
    pool_over_grid(norms, view.time_us, view.grid_position, 7, view.chunk)
    assert torch.allclose(norms, torch.full((2, 50), 3.0))


@pytest.mark.parametrize(("spread", "kernel"), [(0.0, 7), (0.25, 5), (0.35, 3), (0.9, 1)])
def test_the_layers_variation_chooses_the_kernel(spread: float, kernel: int) -> None:
    """Half the norms at 1 - s, half at 1 + s: mean 1, standard deviation s."""
    norms = torch.tensor([1 - spread, 1 + spread]).repeat(2, 30)
    assert pooling_kernel(norms, InfiniPotV().thresholds) == kernel


def oracle(policy: InfiniPotV, which: int, slots: int) -> list[list[int]]:
    """The selection by sorting everything in float64."""
    view = views()[which]
    redundancy = tar_of(which)
    norms = view.values.float().norm(dim=-1)
    kernel = pooling_kernel(norms, policy.thresholds) if policy.pooling == "adaptive" else policy.pooling
    value = van_of(which, kernel)
    by_value = round((1 - policy.alpha) * max(0, slots - policy.tar_first * view.block))
    out = []
    for head in range(view.heads):
        chosen = {n for n in range(view.tokens) if view.protected[head, n]}
        placed = [n for n in range(view.tokens) if redundancy[head][n] > -torch.inf]
        placed.sort(key=lambda n: -redundancy[head][n])
        chosen |= set(placed[: max(0, slots - by_value - len(chosen))])
        rest = sorted(set(range(view.tokens)) - chosen, key=lambda n: -value[head][n])
        out.append(sorted(chosen | set(rest[: slots - len(chosen)])))
    return out


@settings(max_examples=60, deadline=None)
@given(
    which=st.integers(0, 6),
    share=st.floats(0.1, 0.95),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
    tar_first=st.sampled_from([0.0, 1.5, 3.0]),
    pooling=st.sampled_from(["adaptive", 1, 3]),
)
def test_the_selection_equals_brute_force(
    which: int, share: float, alpha: float, tar_first: float, pooling: object
) -> None:
    view = views()[which]
    minimum = int(view.protected[0].sum())
    slots = min(view.tokens - 1, max(minimum, round(share * view.tokens)))
    policy = InfiniPotV(alpha=alpha, tar_first=tar_first, pooling=pooling)  # type: ignore[arg-type]
    assert policy.keep(view, slots).tolist() == oracle(policy, which, slots)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(4, 16),
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    kept=st.floats(0.55, 0.95),
    seed=st.integers(0, 10**6),
)
def test_the_first_pass_without_pooling_is_the_released_one(
    frames: int, rows: int, cols: int, kept: float, seed: int
) -> None:
    ours, released = InfiniPotV(pooling=1, tar_first=0), policies.get("infinipot-v-released")
    recent = ours.recent(frames)
    assert recent == max(1, released.recent(frames))
    view = grid_view(frames, rows, cols, recent=recent, seed=seed, width=16)
    slots = min(frames - 1, max(2 * recent + 1, round(kept * frames))) * view.block
    if round(0.5 * slots) < recent * view.block:
        return
    assert torch.equal(ours.keep(view, slots), released.keep(view, slots))


def test_small_memories_are_mostly_for_redundancy_and_large_ones_as_published() -> None:
    """VaN's share of a memory of F groups is (1 - alpha) (1 - tar_first / F); by `tar_first=0` it is the paper's at every size."""
    ours, paper = InfiniPotV(), InfiniPotV(tar_first=0)
    shares = {groups: ours.by_value(groups * 16, 16) / (groups * 16) for groups in (1, 3, 10, 1000)}
    assert shares == {1: 0, 3: 0.25, 10: 0.425, 1000: pytest.approx(0.5, abs=0.001)}
    assert [paper.by_value(groups * 16, 16) for groups in shares] == [8, 24, 80, 8000]
    with pytest.raises(PolicyError, match="tar_first"):
        InfiniPotV(tar_first=-1)


def test_protection_is_a_mask_in_bfloat16_too() -> None:
    """With `max + 1` a recent token of norm 1 would lose to past ones of norm 300: 300 + 1 is 300 in bfloat16."""
    view = grid_view(8, 2, 2, recent=2, dtype=torch.bfloat16)
    values = torch.ones_like(view.values)
    values[:, :24, 0] = 300
    view = replace(view, values=values)
    assert (values[0, 0].norm() + 1).item() == values[0, 0].norm().item()
    for name in ("infinipot-v", "infinipot-v-released"):
        kept = policies.get(name).keep(view, 16)
        assert bool(torch.isin(torch.arange(24, 32), kept[0]).all())


def test_few_tokens_of_many_frames_are_pooled_as_many_tokens_of_few() -> None:
    """After many passes a frame may have one token left, or five."""
    view = grid_view(40, 4, 5, recent=1)
    for kept in (60, 200):
        sparse = thinned(view, policies.get("random", seed=kept).keep(view, kept), 1)
        norms = value_norms(sparse.values, sparse.chunk)
        pool_over_grid(norms, sparse.time_us, sparse.grid_position, 3, sparse.chunk)
        assert torch.allclose(norms.double(), torch.tensor(van(sparse, 3)).double(), rtol=1e-5)


def test_the_variation_is_the_norms_own() -> None:
    norms = torch.rand(3, 500, generator=torch.Generator().manual_seed(0)) + 1
    cv = float(norms.double().std(correction=0) / norms.double().mean())
    just_above, just_below = (cv * 1.0001,) * 3, (cv * 0.9999,) * 3
    assert pooling_kernel(norms, just_above) == 7
    assert pooling_kernel(norms, just_below) == 1


def test_a_place_that_no_recent_frame_shows_scores_nought() -> None:
    view = joined(grid_view(3, 4, 4), grid_view(3, 2, 2, recent=1))
    scores = redundancy(view)
    outside = (view.grid_position[0, :, 0] >= 2) | (view.grid_position[0, :, 1] >= 2)
    assert bool((scores[0, outside] == 0).all())
    assert bool((scores[0, ~outside & ~view.protected[0]] != 0).all())


def test_what_a_scene_needs_survives() -> None:
    """A still scene with one short change: the change is kept, the repetition forgotten."""
    view = grid_view(20, 4, 4, recent=2, width=32, seed=3)
    ground = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    noise = 0.05 * torch.randn(2, 320, 32, generator=torch.Generator().manual_seed(2))
    keys = ground.repeat(1, 20, 1) + noise
    event = torch.arange(5 * 16 + 5, 5 * 16 + 9)
    keys[:, event] = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(4)) * 2
    kept = InfiniPotV(pooling=1).keep(replace(view, keys=keys, values=torch.ones_like(keys)), 80)
    assert all(bool(torch.isin(event, head).all()) for head in kept)
