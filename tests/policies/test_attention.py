"""Proxy attention and the policies that go by it, against the formulas written out in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, policies
from millpond.policies.attention import add_columns, attention_moments, attention_scratch, proxy_attention
from millpond.policies.base import View
from tests.policies.views import VIEWS, grid_view, thinned
from tests.session.measure import transient_peak


def probabilities(view: View, head: int) -> torch.Tensor:
    """float64 [g, w, n]: every query's softmax over the prompt and the memory, the memory's part."""
    assert view.queries is not None
    assert view.prompt_keys is not None
    keys = torch.cat([view.prompt_keys[head], view.keys[head]]).double()
    scores = view.queries[head].double() @ keys.T / keys.shape[1] ** 0.5
    return scores.softmax(dim=-1)[..., view.prompt_keys.shape[1] :]


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


def score(name: str, view: View, head: int) -> torch.Tensor:
    attention = probabilities(view, head)
    if name == "snapkv":
        return pooled(attention.mean((0, 1)), 5, torch.mean)
    assert name == "cake"
    variance = attention.var(1) if attention.shape[1] > 1 else torch.zeros_like(attention[:, 0])
    return pooled((attention.mean(1) + 200 * variance).mean(0), 5, torch.mean)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "window"), [("snapkv", 2), ("cake", 2)])
def test_what_is_kept_is_what_the_formula_says(name: str, window: int, view: View) -> None:
    policy = policies.get(name, window=window)
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policy.keep(view, slots)
        for head in range(view.heads):
            assert keep[head].tolist() == chosen(score(name, view, head), view, head, slots, window)
        view = thinned(view, keep, 1)


@pytest.mark.parametrize("view", VIEWS)
def test_h2o_keeps_the_latest_half_and_the_largest_sums(view: View) -> None:
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("h2o").keep(view, slots)
        assert view.sums is not None
        for head in range(view.heads):
            assert keep[head].tolist() == chosen(view.sums[head], view, head, slots, round(slots / 2))
        view = thinned(view, keep, 1)


def hermes_score(view: View, head: int, deeper: torch.Tensor) -> torch.Tensor:
    """float64 [n]: one layer's score, blended with the next deeper one's [n] where that is a number."""

    def scaled(scores: torch.Tensor) -> torch.Tensor:
        return (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)

    distance = torch.linspace(1, 0, view.tokens, dtype=torch.float64)
    first, last = int(view.layers * 0.3), int(view.layers * 0.7)
    attention = scaled(probabilities(view, head).mean((0, 1)))
    if view.layer < first:
        own, share = scaled(torch.exp(-20 * distance)), 0.1
    elif view.layer >= last:
        own, share = attention, 0.4
    else:
        progress = (view.layer - first) / (last - first)
        weight = 0.75 - 0.6 * progress
        own = (1 - weight) * attention + weight * scaled(torch.exp(-(20 - 12 * progress) * distance))
        share = 0.3
    return torch.where(deeper.isnan(), own, (1 - share) * own + share * deeper.double())


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 5, 6, 7, 9])
def test_hermes_goes_from_recency_to_attention(layer: int) -> None:
    view = grid_view(8, 3, 3, recent=1, seed=layer, layer=layer, layers=10)
    slots = view.tokens // 2
    keep = policies.get("hermes").keep(view, slots)
    assert view.deeper is not None
    assert view.carry is not None
    for head in range(view.heads):
        expected = hermes_score(view, head, view.deeper[head])
        torch.testing.assert_close(view.carry[head].double(), expected, rtol=1e-4, atol=1e-6)
        if layer >= 7:
            expected[0] = 2  # takes in what is forgotten
        assert keep[head].tolist() == chosen(expected, view, head, slots)


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
    for head, row in enumerate(proxy_attention(view)):
        exact = probabilities(view, head)
        torch.testing.assert_close(row.double(), exact.mean((0, 1)), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(mean[head].double(), exact.mean((0, 1)), rtol=1e-4, atol=1e-7)
        spread = exact.var(1).mean(0) if window > 1 else torch.zeros(view.tokens, dtype=torch.float64)
        torch.testing.assert_close(variance[head].double(), spread, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16 has no compiled kernel
def test_columns_under_a_causal_mask(chunk: int, dtype: torch.dtype) -> None:
    queries, keys = torch.randn(6, 8), torch.randn(20, 8).to(dtype)
    last = torch.tensor([3, 19, 0, 7, 7, 12])
    out = torch.ones(20)
    add_columns(queries, keys[:0], keys, out, chunk, last)
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
    peak = transient_peak(lambda: add_columns(queries, keys, keys, out, chunk, last))
    assert 0 < peak <= attention_scratch(rows, width, chunk)


@pytest.mark.parametrize("name", ["snapkv", "cake", "streammem", "hermes", "h2o"])
def test_nobody_asked_is_said(name: str) -> None:
    view = grid_view(5, 2, 2, layer=3)
    assert view.queries is not None
    with pytest.raises(PolicyError, match="Session"):
        policies.get(name).keep(replace(view, queries=None, sums=None), 9)
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
