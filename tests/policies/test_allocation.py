"""Layer budgets: the exact split, the weights against the formula in float64, and what cannot be combined."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millpond import PolicyError, policies
from millpond.policies.allocators.base import apportion
from millpond.policies.allocators.cake import Cake
from millpond.policies.allocators.diversity import Diversity
from millpond.policies.base import Needs, Shape
from millpond.policies.layered import Layered
from tests.policies.test_attention import probabilities
from tests.policies.views import grid_view, with_text
from tests.session.measure import transient_peak

LAYERS = st.integers(1, 12).flatmap(
    lambda layers: st.tuples(
        st.lists(st.floats(0, 1e6), min_size=layers, max_size=layers),
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 200)), min_size=layers, max_size=layers),
    )
)


@given(LAYERS, st.integers(0, 2000))
def test_the_sum_is_exact_and_the_bounds_hold(layers: tuple, extra: int) -> None:
    weights, bounds = layers
    minimum, most = [low for low, _ in bounds], [low + more for low, more in bounds]
    total = sum(minimum) + extra
    shares = apportion(total, weights, minimum, most)
    assert sum(shares) == min(total, sum(most))
    assert all(low <= share <= high for low, share, high in zip(minimum, shares, most, strict=True))
    # Within the bounds, shares follow the weights to within one token.
    free = [
        (w, s) for w, s, low, high in zip(weights, shares, minimum, most, strict=True) if low < s < high and w > 1e-3
    ]
    for one, two in pairwise(free):
        assert (one[1] + 1) / one[0] >= (two[1] - 1) / two[0]
        assert (two[1] + 1) / two[0] >= (one[1] - 1) / one[0]


def test_equal_weights_are_equal_shares_and_odd_weights_break_nothing() -> None:
    assert apportion(70, [1.0] * 7, [1] * 7, [20] * 7) == [10] * 7
    assert apportion(71, [1.0] * 7, [1] * 7, [20] * 7) == [11, *[10] * 6]
    assert apportion(100, [3.0, 1.0], [1, 1], [1000, 1000]) == [75, 25]
    assert apportion(100, [math.nan, 1.0], [10, 1], [1000, 1000]) == [10, 90]
    assert apportion(100, [math.inf, -1.0], [10, 1], [1000, 1000]) == [50, 50]  # no weight is left
    assert apportion(100, [1.0, 0.0], [1, 1], [60, 1000]) == [60, 40]
    for weights, minimum, most in [([1.0], [1, 1], [2, 2]), ([1.0, 1.0], [60, 60], [70, 70])]:
        with pytest.raises(PolicyError):
            apportion(100, weights, minimum, most)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_diversity_is_the_published_softmax(temperature: float) -> None:
    views = [grid_view(7, 2, 3, seed=seed, layer=seed, width=16) for seed in range(3)]
    views.append(with_text(grid_view(5, 3, 3, seed=9, chunk=4)))
    expected = []
    for view in views:
        cosines = []
        for keys in view.keys.double():
            unit = keys / keys.norm(dim=-1, keepdim=True)
            cosines += (unit @ unit.mean(0)).tolist()
        expected.append(math.exp((1 - sum(cosines) / len(cosines)) / temperature))
    weights = Diversity(temperature).weights(iter(views))
    assert weights == pytest.approx(expected, rel=1e-5)
    behind = policies.get("infinite-vggt", temperature=temperature).layer_weights(iter(views[:1]))
    first = views[0].keys[:, 6:].double()
    unit = first / first.norm(dim=-1, keepdim=True)
    alike = float((unit * unit.mean(1, keepdim=True)).sum(-1).mean())
    assert behind == pytest.approx([math.exp((1 - alike) / temperature)], rel=1e-5)


@pytest.mark.parametrize("tau", [(1.0, 1.0), (0.5, 2.0)])
def test_cake_is_entropy_times_variance_of_what_the_proxy_attends_to(tau: tuple[float, float]) -> None:
    views = [grid_view(7, 2, 3, seed=seed, layer=seed, width=16) for seed in range(3)]
    views.append(with_text(grid_view(5, 3, 3, seed=9, chunk=4)))
    expected = []
    for view in views:
        assert view.queries is not None
        entropy = variance = 0.0
        for head in range(view.heads):
            for share in probabilities(view, head, latest=True)[..., : -view.queries.shape[2]]:
                entropy -= float(share.xlogy(share).sum())
                variance += float(share.var(dim=0).sum())
        expected.append(entropy ** (1 / tau[0]) * variance ** (1 / tau[1]))
    cake = Cake(tau1=tau[0], tau2=tau[1])
    assert cake.weights(iter(views)) == pytest.approx(expected, rel=1e-4)
    peak = transient_peak(lambda: cake.weights(iter(views[:1])))
    assert 0 < peak <= cake.scratch(Shape(views[0].heads, views[0].tokens, 16, views[0].block, views[0].chunk))


def test_an_allocator_brings_its_proxy_along() -> None:
    """`keydiff` looks at no queries, so CAKE's budgets bring their own; `snapkv` shows what it looks at."""
    assert policies.read("keydiff+cake").needs == Needs(proxy="latest", queries=32, layer_share=2.0)
    assert policies.read("snapkv:window=8+cake").needs.queries == 8
    assert policies.read("streammem+cake").needs.proxy == "prompt"
    for bad in ("window=1", "tau1=0", "tau2=-1"):
        with pytest.raises(PolicyError, match="cake"):
            policies.read(f"recent+cake:{bad}")


def test_layers_whose_keys_differ_more_get_more() -> None:
    alike, apart = grid_view(8, 2, 2, seed=1), grid_view(8, 2, 2, seed=2)
    alike.keys.add_(3)
    weights = Diversity().weights(iter([alike, apart]))
    assert weights[0] < weights[1]


def test_any_policy_takes_an_allocator_by_name_and_passes_the_rest_on() -> None:
    layered = policies.read("infinipot-v:alpha=0.3+diversity:temperature=1.0")
    assert isinstance(layered, Layered)
    assert (layered.name, layered.needs.layer_share) == ("infinipot-v+diversity", 2.0)
    scorer = policies.get("infinipot-v", alpha=0.3)
    view = grid_view(12, 3, 4, recent=3)
    assert torch.equal(layered.keep(view, 84), scorer.keep(view, 84))
    assert layered.recent(12) == scorer.recent(12) == 3
    shape = Shape(2, view.tokens, 8, view.block, view.chunk)
    assert layered.scratch(shape) >= scorer.scratch(shape)
    for text, words in [
        ("full+diversity", "layer budgets and no cap do not go together"),
        ("infinipot-v-released+diversity", "whole frames and layer budgets do not go together"),
        ("infinite-vggt+diversity", "has layer budgets already"),
        ("recent+nonesuch", "no allocator is called"),
        ("recent+", "name an allocator"),
        ("recent+diversity:temperature=0", "temperature"),
    ]:
        with pytest.raises(PolicyError, match=words):
            policies.read(text)
    with pytest.raises(PolicyError, match="infinite-vggt"):
        policies.get("infinite-vggt", temperature=-1)
    assert policies.get("infinite-vggt", temperature=None).needs.layer_share == 1
