"""Proxy attention and the policies that go by it, against the formulas written out in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, ops, policies
from millpond.policies.base import TEXT, View
from millpond.policies.scoring.attention import attention_moments, attention_scratch, proxy_attention
from tests.policies.views import VIEWS, grid_view, thinned
from tests.session.measure import transient_peak


def probabilities(view: View, head: int, *, latest: bool) -> torch.Tensor:
    """float64 [g, w, n]: every query's softmax over the prompt and the memory, the memory's part; the latest tokens' see nothing newer."""
    assert view.queries is not None
    assert view.prompt_keys is not None
    keys = torch.cat([view.prompt_keys[head], view.keys[head]]).double()
    scores = view.queries[head].double() @ keys.T / keys.shape[1] ** 0.5
    prompt = view.prompt_keys.shape[1]
    if latest:
        count = scores.shape[1]
        frames = [at for at, row in enumerate(view.grid_position[head, :, 0].tolist()) if row != TEXT][-count:]
        for query, at in enumerate([frames[0]] * (count - len(frames)) + frames):
            scores[:, query, prompt + at + 1 :] = -torch.inf
    return scores.softmax(dim=-1)[..., prompt:]


def pooled(scores: torch.Tensor, kernel: int, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Over each token's neighbours in memory; beyond the ends nothing is attended to."""
    reach = kernel // 2
    padded = torch.cat([scores.new_zeros(reach), scores, scores.new_zeros(reach)])
    return torch.stack([pool(padded[i : i + kernel]) for i in range(len(scores))])


def chosen(scores: torch.Tensor, view: View, head: int, slots: int, window: int = 0) -> list[int]:
    """The protected, as many of the latest `window` as fit, and the best of the others."""
    kept = set(view.protected[head].nonzero()[:, 0].tolist())
    room = min(window, slots - len(kept))
    kept |= set(range(view.tokens - room, view.tokens))
    order = sorted((i for i in range(view.tokens) if i not in kept), key=lambda i: -float(scores[i]))
    return sorted([*kept, *order[: slots - len(kept)]])


def score(name: str, view: View, head: int, window: int) -> torch.Tensor:
    """Pooled in front of the window, which gives nothing to its neighbours and gets nothing from them."""
    attention = probabilities(view, head, latest=True)
    scores = attention.mean((0, 1))
    if name == "cake":
        variance = attention.var(1) if attention.shape[1] > 1 else torch.zeros_like(attention[:, 0])
        scores = (attention.mean(1) + 200 * variance).mean(0)
    return torch.cat([pooled(scores[:-window], 5, torch.mean), scores[-window:]])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "window"), [("snapkv", 2), ("cake", 2)])
def test_what_is_kept_is_what_the_formula_says(name: str, window: int, view: View) -> None:
    policy = policies.get(name, window=window)
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policy.keep(view, slots)
        for head in range(view.heads):
            assert keep[head].tolist() == chosen(score(name, view, head, window), view, head, slots, window)
        view = thinned(view, keep, 1)


@pytest.mark.parametrize("name", ["snapkv", "cake"])
def test_what_the_window_holds_gives_nothing_to_its_neighbours(name: str) -> None:
    """One token of the window draws nearly all attention: those in front of it are no better for it."""
    view = grid_view(20, 1, 2, recent=1, group=1, window=4)
    assert view.queries is not None
    keys, queries = view.keys.clone() / 100, torch.zeros_like(view.queries)
    queries[..., 0] = 30
    keys[:, -4, 0], keys[:, 0, 0] = 30, 29.9  # the window's first token, and a far one that gets a little
    keep = policies.get(name, window=4).keep(replace(view, keys=keys, queries=queries), 7)
    assert all(set(row) == {0, 1, 2, 36, 37, 38, 39} for row in keep.tolist())


@pytest.mark.parametrize("view", VIEWS)
def test_h2o_keeps_the_latest_half_and_the_largest_sums(view: View) -> None:
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("h2o").keep(view, slots)
        assert view.accumulated_attention is not None
        for head in range(view.heads):
            assert keep[head].tolist() == chosen(view.accumulated_attention[head], view, head, slots, round(slots / 2))
        view = thinned(view, keep, 1)


def hermes_score(view: View, head: int, deeper_scores: torch.Tensor) -> torch.Tensor:
    """float64 [n]: one layer's score, blended with the next deeper one's [n] where that is a number."""

    def scaled(scores: torch.Tensor) -> torch.Tensor:
        return (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)

    distance = torch.linspace(1, 0, view.tokens, dtype=torch.float64)
    first, last = int(view.layers * 0.1), int(view.layers * 0.7)
    attention = scaled(probabilities(view, head, latest=False).mean((0, 1)))
    if view.layer < first:
        own, share = scaled(torch.exp(-20 * distance)), 0.1
    elif view.layer >= last:
        own, share = attention, 0.4
    else:
        progress = (view.layer - first) / (last - first)
        weight = 0.75 - 0.6 * progress
        own = (1 - weight) * attention + weight * scaled(torch.exp(-(20 - 12 * progress) * distance))
        share = 0.3
    return torch.where(deeper_scores.isnan(), own, (1 - share) * own + share * deeper_scores.double())


def chosen_by_hermes(scores: torch.Tensor, view: View, head: int, slots: int) -> list[int]:
    """The best; of ten layers' last three one less, and the latest of the others, which takes in what is forgotten."""
    if view.layer < 7 or slots == int(view.protected[head].sum()):
        return chosen(scores, view, head, slots)
    best = chosen(scores, view, head, slots - 1)
    return sorted([*best, max(set(range(view.tokens)) - set(best))])


@pytest.mark.parametrize("layer", [0, 1, 2, 6, 7, 9])
def test_hermes_goes_from_recency_to_attention(layer: int) -> None:
    view = grid_view(8, 3, 3, recent=1, seed=layer, layer=layer, layers=10)
    slots = view.tokens // 2
    keep = policies.get("hermes").keep(view, slots)
    assert view.deeper_scores is not None
    assert view.carried_scores is not None
    for head in range(view.heads):
        expected = hermes_score(view, head, view.deeper_scores[head])
        torch.testing.assert_close(view.carried_scores[head].double(), expected, rtol=1e-4, atol=1e-6)
        assert keep[head].tolist() == chosen_by_hermes(expected, view, head, slots)


def test_a_small_model_has_no_shallow_layer() -> None:
    """Minnow: a tenth of four layers is none, and the first begins the mix."""
    assert policies.get("hermes").mix(0, 4) == (0.75, 20.0, 0.3)  # type: ignore[attr-defined]
    assert policies.get("hermes", shallow=0.3).mix(0, 4) == (1.0, 20.0, 0.1)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 9),
    size=st.integers(1, 7),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    window=st.integers(1, 9),
    chunk=st.integers(1, 40),
    prompt=st.integers(0, 3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_attention_in_chunks_equals_the_softmax(
    frames: int,
    size: int,
    heads: int,
    group: int,
    window: int,
    chunk: int,
    prompt: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    view = grid_view(
        frames, size, 1, heads=heads, group=group, window=window, chunk=chunk, seed=seed, width=16, dtype=dtype
    )
    assert view.prompt_keys is not None
    view = replace(view, prompt_keys=view.prompt_keys[:, :prompt])
    mean, variance = attention_moments(view)
    of_latest, of_text = (proxy_attention(view, latest=latest) for latest in (True, False))
    for head in range(view.heads):
        exact = probabilities(view, head, latest=False)
        torch.testing.assert_close(of_text[head].double(), exact.mean((0, 1)), rtol=1e-4, atol=1e-7)
        exact = probabilities(view, head, latest=True)
        torch.testing.assert_close(of_latest[head].double(), exact.mean((0, 1)), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(mean[head].double(), exact.mean((0, 1)), rtol=1e-4, atol=1e-7)
        spread = exact.var(1).mean(0) if window > 1 else torch.zeros(view.tokens, dtype=torch.float64)
        torch.testing.assert_close(variance[head].double(), spread, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16 has no compiled kernel
def test_columns_under_a_causal_mask(chunk: int, dtype: torch.dtype) -> None:
    queries, keys = torch.randn(6, 8), torch.randn(20, 8).to(dtype)
    last = torch.tensor([3, 19, 0, 7, 7, 12])
    out = torch.ones(20)
    ops.add_attention(queries, keys[:0], keys, out, chunk, last)
    scores = queries.double() @ keys.double().T / 8**0.5
    scores[torch.arange(20) > last[:, None]] = -torch.inf
    torch.testing.assert_close(out.double(), 1 + scores.softmax(1).sum(0))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 80), tokens=st.integers(1, 300), width=st.sampled_from([16, 64, 128]), chunk=st.integers(1, 200)
)
def test_scratch_of_attention_is_bounded(rows: int, tokens: int, width: int, chunk: int) -> None:
    queries, keys, out = torch.randn(rows, width), torch.randn(tokens, width).bfloat16(), torch.zeros(tokens)
    last = torch.arange(rows)
    peak = transient_peak(lambda: ops.add_attention(queries, keys, keys, out, chunk, last))
    assert 0 < peak <= attention_scratch(rows, width, chunk)


@pytest.mark.parametrize("name", ["snapkv", "cake", "streammem", "hermes", "h2o"])
def test_nobody_asked_is_said(name: str) -> None:
    view = grid_view(5, 2, 2, layer=3)
    assert view.queries is not None
    with pytest.raises(PolicyError, match="Session"):
        policies.get(name).keep(replace(view, queries=None, accumulated_attention=None), 9)
    if name != "h2o":
        with pytest.raises(PolicyError, match="Session"):
            policies.get(name).keep(replace(view, queries=view.queries[:, :, :0]), 9)


def test_parameters_are_checked() -> None:
    for name, bad in [
        ("snapkv", {"window": 0}),
        ("snapkv", {"window": 2.5}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"pooling": "min"}),
        ("cake", {"window": 0}),
        ("cake", {"gamma": -1}),
        ("h2o", {"recent_share": 1.5}),
        ("hermes", {"deep": -0.1}),
        ("hermes", {"shallow": 0.8}),
        ("hermes", {"fade": 0.9}),
    ]:
        with pytest.raises(PolicyError, match=name):
            policies.get(name, **bad)
    view = grid_view(8, 2, 2, recent=1)
    assert not torch.equal(
        policies.get("snapkv", window=1).keep(view, 12), policies.get("snapkv", window=1, kernel=1).keep(view, 12)
    )
    assert policies.get("snapkv", pooling="max").keep(view, 12).shape == (2, 12)
