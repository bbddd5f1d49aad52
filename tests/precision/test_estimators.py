"""Estimates of how far two bit-widths are apart: unbiased, drawn from the right input, thresholds that keep their rates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import precision
from millpond.precision.calibration import Choice
from millpond.precision.decoder import decoder_of, linears
from millpond.precision.estimators import (
    _choice,
    _is_early,
    _line,
    _Probe,
    _projection,
    choose_estimators,
    meet_shares,
)
from millpond.precision.linear import NestedLinear
from millpond.precision.nested import nest
from millpond.precision.pairs import Pair
from millpond.precision.selection import EARLY, early_inputs, every_token, select
from tests.precision.models import runs


def linear(rows: int, columns: int, seed: int = 0) -> NestedLinear:
    rng = torch.Generator().manual_seed(seed)
    return NestedLinear(nest(torch.randn(rows, columns, generator=rng), torch.ones(rows, columns), low=3, high=5))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(-5, 5), st.floats(-5, 5))
def test_the_line_is_least_squares(seed: int, slope: float, noise: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(50) + 3
    y = slope * x + 2 + noise * rng.standard_normal(50)
    found = _line(torch.from_numpy(x), torch.from_numpy(y))
    want = np.polyfit(x, y, 1)
    assert found[:2] == pytest.approx(want, rel=1e-6, abs=1e-6)
    if y.std() > 1e-6:
        assert found[2] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-6)


def test_projections_are_unbiased_in_the_square() -> None:
    part, rng = linear(160, 40), torch.Generator().manual_seed(1)
    x = torch.randn(6, 40, generator=rng)
    exact = (x @ (part.weight.dense(5) - part.weight.dense(4)).T).norm(dim=-1).square()
    drawn = [_projection(part, Pair(4, 5, 0.5), rng) for _ in range(400)]
    mean = torch.stack([(x @ one.float().T).norm(dim=-1).square() for one in drawn]).mean(0)
    assert torch.allclose(mean, exact, rtol=0.1)


@pytest.mark.parametrize(("rows", "directions"), [(8, 1), (48, 3), (192, 12), (576, 36), (1536, 64), (4096, 64)])
def test_projections_stay_small(rows: int, directions: int) -> None:
    drawn = _projection(linear(rows, 8), Pair(3, 4, 0.5), torch.Generator().manual_seed(0))
    assert drawn.shape == (directions, 8)


def probed(part: NestedLinear, x: torch.Tensor, share_low: float) -> tuple[_Probe, Choice]:
    rng, pair = torch.Generator().manual_seed(0), Pair(3, 4, share_low)
    probe = _Probe(part, pair, False, _projection(part, pair, rng), rng)
    probe(x)
    return probe, _choice(probe, pair)


@pytest.mark.parametrize("share_low", [0.1, 0.5, 0.8])
def test_a_line_where_it_fits_and_a_projection_elsewhere(share_low: float) -> None:
    part, rng = linear(64, 48), torch.Generator().manual_seed(2)
    lengths = 1 + torch.rand(200, 1, generator=rng) * 5
    one_way = lengths * torch.nn.functional.normalize(torch.randn(1, 48, generator=rng), dim=-1)
    any_way = torch.nn.functional.normalize(torch.randn(200, 48, generator=rng), dim=-1)
    for x, fits in ((one_way, True), (any_way, False)):
        probe, made = probed(part, x, share_low)
        assert (made.projection is None) == fits == (probe.fit.r2 >= 0.9)
        estimate = made.estimate(x)
        if fits:
            exact = (x @ (part.weight.dense(4) - part.weight.dense(3)).T).norm(dim=-1)
            assert torch.allclose(estimate, exact, rtol=1e-3)
        assert float((estimate > made.threshold).float().mean()) == pytest.approx(1 - share_low, abs=0.01)


@torch.no_grad()
def test_early_inputs_are_one_sub_layer_old(stored: Path) -> None:
    """q, k, v of layer i see its norm of what enters layer i-1's post-attention norm; gate and up see theirs of what enters layer i."""
    model = precision.load(stored, bits=5)
    ids = runs(samples=2)
    layers = list(decoder_of(model).layers)
    attended: dict[int, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, out, index=index: attended.update({index: out[0]}))
        for index, layer in enumerate(layers)
    ]
    hooks += early_inputs(model, lambda prefix, norm, x: seen.update({prefix: norm.forward(x)}))
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert set(seen) == {"0.mlp", "1.mlp", "1.self_attn"}
    for index, layer in enumerate(layers):
        assert torch.allclose(seen[f"{index}.mlp"], layer.post_attention_layernorm(states[index]), atol=1e-5)
    before_mlp = states[0] + attended[0]
    assert torch.allclose(seen["1.self_attn"], layers[1].input_layernorm(before_mlp), atol=1e-5)
    early = {name for name, _ in linears(model) if _is_early(name)}
    assert early == {f"{i}.{leaf}" for i in range(2) for leaf in EARLY if i or leaf.startswith("mlp")}


def rates(model: Any, choices: dict[str, Choice], ids: torch.Tensor) -> dict[str, float]:
    hooks = select(model, choices)
    for _, part in linears(model):
        part.counts.clear()
    with torch.no_grad(), every_token(model):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: part.counts.get(part.low, 0) / sum(part.counts.values()) for name, part in linears(model)}


def test_thresholds_keep_their_rates_with_the_decisions_in_force(stored: Path) -> None:
    model, ids = precision.load(stored), runs(samples=16)
    shares = dict(zip([name for name, _ in linears(model)], np.linspace(0.15, 0.85, 14).tolist(), strict=True))
    pairs = {name: Pair(3, 4, share) for name, share in shares.items()}
    choices, fits = choose_estimators(model, pairs, ids)
    assert set(fits) == set(pairs)
    assert {name for name, choice in choices.items() if choice.early} == {name for name in pairs if _is_early(name)}
    wrong = {name: Choice(**{**vars(choice), "threshold": choice.threshold * 1.5}) for name, choice in choices.items()}
    off = rates(model, wrong, ids)
    assert max(abs(off[name] - share) for name, share in shares.items()) > 0.1
    met = rates(model, meet_shares(model, pairs, wrong, ids, rounds=3), ids)
    assert met == pytest.approx(shares, abs=0.03)


def test_fixed_linears_cost_nothing(stored: Path) -> None:
    model, ids = precision.load(stored), runs(samples=2)
    pairs = {name: Pair(4, 4, 1.0) for name, _ in linears(model)}
    choices, fits = choose_estimators(model, pairs, ids)
    assert not fits
    assert all(choice.projection is None and not choice.early for choice in choices.values())
    assert meet_shares(model, pairs, choices, ids) == choices
    assert set(rates(model, choices, ids).values()) == {1.0}
