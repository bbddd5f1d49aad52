"""CurveStream's rule against the formula written out over the whole history, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, admission
from millpond.admission import Verdict


def verdicts(features: torch.Tensor, **parameters: float) -> list[Verdict]:
    rule, state, found = admission.get("curvestream", **parameters), None, []
    for feature in features.float():
        verdict, state = rule.judge(feature, state)
        found.append(verdict)
    return found


def by_hand(features: torch.Tensor, k: float) -> list[Verdict | None]:
    """Every curvature against the mean and deviation of the list of all before; None where it hangs on a last bit."""
    points, curvatures, found = features.double(), [], []
    for t in range(len(points)):
        if t < 2:
            found.append("clear")
            continue
        before, now = points[t - 1] - points[t - 2], points[t] - points[t - 1]
        lengths = float(before.norm() * now.norm())
        cos = float(before @ now) / lengths if lengths else (1.0 if not now.any() else 0.0)
        curvature = 1 - cos
        if len(curvatures) < 2:
            found.append("clear")
        else:
            mean = sum(curvatures) / len(curvatures)
            sigma = math.sqrt(sum((c - mean) ** 2 for c in curvatures) / len(curvatures))
            high, low = mean + k * sigma, mean - k * sigma
            near = min(abs(curvature - high), abs(curvature - low)) < 1e-5
            found.append(None if near else "clear" if curvature > high else "drop" if curvature < low else "reduced")
        curvatures.append(curvature)
    return found


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    width=st.sampled_from([2, 7, 64]),
    k=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    drift=st.floats(0, 3),
    still=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_rule(count: int, width: int, k: float, drift: float, still: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, width, generator=random) + drift
    if still:  # groups that equal the one before
        steps[torch.rand(count, generator=random) < 0.3] = 0
    # Whole numbers, so that steps come out the same in float32 and float64.
    features = (steps * 64).round().cumsum(0)
    for found, expected in zip(verdicts(features, k=k), by_hand(features, k), strict=True):
        assert expected in (found, None)


def test_a_turn_is_clear_and_a_straight_run_is_dropped_only_where_turns_are_the_rule() -> None:
    line = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.0])
    assert verdicts(line) == ["clear"] * 4 + ["reduced"] * 4
    assert verdicts(torch.ones(8, 3)) == ["clear"] * 4 + ["reduced"] * 4  # nothing moves: thinned, never lost
    turned = torch.cat([line, line[-1] + torch.tensor([[0.0, 1.0]])])
    assert verdicts(turned)[-1] == "clear"
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3], [3, 4]])
    assert verdicts(corners)[-2:] == ["reduced", "drop"]


def test_a_feature_that_is_no_number_is_let_in_and_forgotten() -> None:
    random = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    broken = torch.cat([random[:6], torch.full((1, 4), torch.nan), random[6:]])
    found = verdicts(broken)
    assert found.pop(6) == "clear"
    assert found == verdicts(random)


def test_a_state_is_small_and_never_changed() -> None:
    rule, state = admission.get("curvestream"), None
    for feature in torch.randn(20, 16).split(1):
        feature = feature[0].clone()
        before = None if state is None else (state.feature.clone(), state.count, state.mean)
        old = state
        _, state = rule.judge(feature, state)
        if old is not None and before is not None:
            assert torch.equal(old.feature, before[0])
            assert (old.count, old.mean) == before[1:]
    held = sum(t.untyped_storage().nbytes() for t in vars(state).values() if isinstance(t, torch.Tensor))
    assert rule.state_bytes(16) == held == 2 * 16 * 4


def test_names_and_parameters() -> None:
    assert [found.name for found in admission.available()] == ["curvestream"]
    assert admission.read("curvestream:k=2").k == 2  # type: ignore[attr-defined]
    for bad in ({"k": -1}, {"k": float("nan")}, {"k": "much"}):
        with pytest.raises(PolicyError, match="curvestream"):
            admission.get("curvestream", **bad)
    with pytest.raises(PolicyError, match="no admission is called 'nonesuch'; there are: curvestream"):
        admission.get("nonesuch")
