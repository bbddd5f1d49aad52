"""Folding, and the policies that merge, against their formulas written out token by token in float64."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, ops, policies
from millpond.ops import dispatch
from millpond.policies.base import Shape, View
from millpond.policies.scoring.merging import fold, fold_scratch
from tests.policies.test_attention import chosen, probabilities
from tests.policies.views import VIEWS, grid_view, thinned
from tests.session.measure import transient_peak


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(dispatch, "kernels_enabled", False)
        yield


def alike(view: View, seed: int) -> View:
    """The same with neighbours that resemble each other, as in video."""
    rng = torch.Generator().manual_seed(seed)
    keys = view.keys[:, :1] + torch.randn(view.keys.shape, generator=rng).cumsum(1) * 0.2
    return replace(view, keys=keys.to(view.keys.dtype))


def after(view: View, name: str, keep: torch.Tensor) -> View:
    changed = replace(view, keys=view.keys.clone(), values=view.values.clone())
    policies.get(name).merge(changed, keep)
    return changed


def attention(view: View, head: int, *, latest: bool = False) -> list[float]:
    return probabilities(view, head, latest=latest).mean((0, 1)).tolist()


def expect(view: View, changed: View, head: int, groups: dict[int, list[tuple[int, float]]]) -> None:
    """`groups`: for each token that takes others in, all that go into it with their weights; every other token is as it was."""
    for before, now in ((view.keys, changed.keys), (view.values, changed.values)):
        for token in range(view.tokens):
            if token not in groups:
                assert torch.equal(now[head, token], before[head, token])
                continue
            total = sum(weight for _, weight in groups[token])
            mean = sum(before[head, one].double() * weight for one, weight in groups[token]) / total
            torch.testing.assert_close(now[head, token].double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 60),
    chunk=st.integers(1, 20),
    starts=st.lists(st.integers(0, 59), min_size=1, max_size=12),
    holes=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_fold_is_the_weighted_mean(tokens: int, chunk: int, starts: list[int], holes: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(holes)
    view = replace(grid_view(tokens, 1, 1, chunk=chunk, seed=holes, dtype=dtype))
    first = torch.zeros(tokens, dtype=torch.bool)
    first[[start % tokens for start in starts]] = True
    first[0] = True
    owner = torch.arange(tokens)[first][first.cumsum(0) - 1]
    owner[torch.rand(tokens, generator=rng) < 0.3] = -1
    weight = torch.rand(tokens, generator=rng)
    weight[torch.rand(tokens, generator=rng) < 0.1] = 0
    view.keys[0, tokens // 2, 0] = torch.nan  # counts for nothing, key and value
    before = replace(view, keys=view.keys.clone(), values=view.values.clone())
    fold(view, 0, owner, weight)
    for was, now in ((before.keys[0], view.keys[0]), (before.values[0], view.values[0])):
        for token in range(tokens):
            into = [i for i in range(tokens) if owner[i] == token and weight[i] > 0 and i != tokens // 2]
            if not into:
                assert torch.equal(now[token].nan_to_num(), was[token].nan_to_num())
                continue
            mean = (was[into].double() * weight[into, None].double()).sum(0) / weight[into].double().sum()
            close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(now[token].double(), mean, **close)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 300), width=st.sampled_from([16, 64, 128]), chunk=st.integers(16, 200))
def test_scratch_of_folding_is_bounded(tokens: int, width: int, chunk: int) -> None:
    view = grid_view(tokens, 1, 1, width=width, chunk=chunk, dtype=torch.bfloat16)
    owner = (torch.arange(tokens) // 5 * 5).clamp(max=tokens - 1)
    weight = torch.ones(tokens)
    for run in (lambda: fold(view, 0, owner, weight), lambda: ops.distances(view.keys[0], owner, chunk)):
        # A tensor of the test's own, so that the allocator says something.
        assert transient_peak(lambda run=run: (torch.ones(1), run())) <= fold_scratch(Shape(1, tokens, width, 1, chunk))


@pytest.mark.parametrize("view", VIEWS)
def test_streammem_keeps_one_token_of_every_frame_and_folds_the_others_into_it(view: View) -> None:
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("streammem").keep(view, slots)
        changed = after(view, "streammem", keep)
        for head in range(view.heads):
            score, times = attention(view, head), view.time_us[head].tolist()
            kept = set(view.protected[head].nonzero()[:, 0].tolist())
            order = sorted((i for i in range(view.tokens) if i not in kept), key=lambda i: -score[i])
            best = kept | set(order[: slots - len(kept)])
            lost = set(times) - {times[i] for i in best}
            ones = [max((i for i in order if times[i] == time), key=lambda i: score[i]) for time in lost]
            ones = sorted(ones, key=lambda i: -score[i])[: min(slots // 2, slots - len(kept))]
            kept |= set(ones)
            kept |= set([i for i in order if i not in kept][: slots - len(kept)])
            assert keep[head].tolist() == sorted(kept)
            groups = {}
            for time in set(times):
                frame = [i for i in range(view.tokens) if times[i] == time]
                stays = [i for i in frame if i in kept and not view.protected[head, i]]
                if stays and len(gone := [i for i in frame if i not in kept]) > 0:
                    carrier = min(stays, key=lambda i: score[i])
                    groups[carrier] = [(i, score[i]) for i in [*gone, carrier]]
            expect(view, changed, head, groups)
        view = thinned(changed, keep, 1)


@pytest.mark.parametrize("layer", [0, 6, 7, 9])
@pytest.mark.parametrize("view", VIEWS[:3])
def test_hermes_sums_up_in_deep_layers_what_it_forgets(view: View, layer: int) -> None:
    """The mean of the values, and of the keys as they would lie at the position of the token that they go into."""
    view = replace(view, layer=layer, layers=10)
    assert view.rope is not None
    for _ in range(2):
        keep = policies.get("hermes").keep(view, view.tokens * 2 // 3)
        changed = after(view, "hermes", keep)
        assert view.carried_scores is not None
        assert view.positions is not None
        for head in range(view.heads):
            gone = sorted(set(range(view.tokens)) - set(keep[head].tolist()))
            if layer < 7:
                expect(view, changed, head, {})
                continue
            best = chosen(view.carried_scores[head], view, head, keep.shape[1] - 1)
            summary = max(set(range(view.tokens)) - set(best))
            everything = [*gone, summary]
            by = (view.positions[head, summary] - view.positions[head, everything]).long()
            turned = view.keys[head, everything].float()
            view.rope.rotate_(turned, by)
            torch.testing.assert_close(changed.keys[head, summary], turned.mean(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                changed.values[head, summary], view.values[head, everything].mean(0), atol=1e-5, rtol=1e-5
            )
            others = [i for i in range(view.tokens) if i != summary]
            assert torch.equal(changed.keys[head, others], view.keys[head, others])
            assert torch.equal(changed.values[head, others], view.values[head, others])
        view = thinned(changed, keep, 1)


def test_hermes_says_that_it_was_shown_no_positions() -> None:
    view = replace(VIEWS[0], layer=3, layers=4)
    keep = policies.get("hermes").keep(view, view.tokens // 2 + 4)
    with pytest.raises(PolicyError, match="Session"):
        policies.get("hermes").merge(replace(view, rope=None), keep)


def runs(view: View, head: int, slots: int, heavy_share: float) -> tuple[list[list[int]], list[float]]:
    """KVMerger's runs, by joining the most alike neighbours one after the other."""
    score, keys = attention(view, head, latest=True), view.keys[head].double()
    fixed = set(view.protected[head].nonzero()[:, 0].tolist())
    room = slots - len(fixed)
    free = sorted((i for i in range(view.tokens) if i not in fixed), key=lambda i: -score[i])
    fixed |= set(free[: min(int(heavy_share * slots), max(0, room - 1))])
    pairs = [i for i in range(view.tokens - 1) if i not in fixed and i + 1 not in fixed]
    pairs.sort(key=lambda i: -float(torch.cosine_similarity(keys[i], keys[i + 1], dim=0)))
    joined_pairs = set(pairs[: view.tokens - slots])
    found = [[0]]
    for i in range(1, view.tokens):
        if i - 1 in joined_pairs:
            found[-1].append(i)
        else:
            found.append([i])
    return found, score


@pytest.mark.parametrize("view", [alike(view, seed) for seed, view in enumerate(VIEWS)])
def test_kvmerger_joins_like_neighbours_around_their_pivot(view: View) -> None:
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("kvmerger").keep(view, slots)
        changed = after(view, "kvmerger", keep)
        for head in range(view.heads):
            found, score = runs(view, head, slots, 0.25)
            pivots = [max(run, key=lambda i: (score[i], -i)) for run in found]
            over = len(pivots) - slots
            dropped = sorted((p for p in pivots if not view.protected[head, p]), key=lambda p: score[p])[: max(0, over)]
            assert keep[head].tolist() == sorted(set(pivots) - set(dropped))
            groups, keys = {}, view.keys[head].double()
            for run, pivot in zip(found, pivots, strict=True):
                if len(run) == 1 or pivot in dropped:
                    continue
                apart = {i: float((keys[i] - keys[pivot]).norm()) for i in run if i != pivot}
                spread = sum(apart.values()) / len(apart)
                groups[pivot] = [(pivot, 1.0)] + [
                    (i, math.exp(-((distance / spread) ** 2) / 2))
                    for i, distance in apart.items()
                    if torch.cosine_similarity(keys[i], keys[pivot], dim=0) >= 0.75
                ]
            expect(view, changed, head, groups)
        view = thinned(changed, keep, 1)


def test_tokens_unlike_their_pivot_are_forgotten_not_averaged() -> None:
    view = VIEWS[4]  # random keys: hardly any two are alike
    keep = policies.get("kvmerger").keep(view, view.tokens // 2)
    assert torch.equal(after(view, "kvmerger", keep).keys.view(torch.uint8), view.keys.contiguous().view(torch.uint8))
    loose = policies.get("kvmerger", threshold=-1.0)
    changed = replace(view, keys=view.keys.clone(), values=view.values.clone())
    loose.merge(changed, loose.keep(view, view.tokens // 2))
    assert not torch.equal(changed.keys, view.keys)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("kvmerger", {"window": 0}),
        ("kvmerger", {"heavy": 1.5}),
        ("kvmerger", {"threshold": 2.0}),
        ("streammem", {"prototypes": -0.1}),
    ],
)
def test_bad_parameters_get_one_line(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match=next(iter(parameters))):
        policies.get(name, **parameters)
