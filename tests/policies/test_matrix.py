"""Every registered policy through the same matrix: the contract, whatever the view."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, ops, policies
from millpond.ops import dispatch
from millpond.plugins import Plugins
from millpond.policies.base import Policy, Shape, View, keep_top
from tests.policies.views import grid_view, joined, thinned, with_text
from tests.session.measure import transient_peak

CAPPED = [policy.name for policy in policies.available() if policy.capped]
ANY_VIEW = [name for name in CAPPED if name != "infinipot-v-released"]  # which knows whole frames only


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every policy with the compiled loops, where they can be had, and with torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "kernels_enabled", False)
    return request.param


def check(policy: Policy, view: View, slots: int) -> torch.Tensor:
    before = [
        t.clone(memory_format=torch.contiguous_format)
        for t in (view.keys, view.values, view.time_us, view.grid_position, view.protected)
    ]
    keep = policy.keep(view, slots)
    assert keep.shape == (view.heads, slots)
    assert keep.dtype == torch.int64
    assert bool((keep[:, 1:] > keep[:, :-1]).all())
    assert int(keep.min()) >= 0
    assert int(keep.max()) < view.tokens
    assert bool((view.protected.gather(1, keep).sum(1) == view.protected.sum(1)).all()), "a protected token was dropped"
    after = (view.keys, view.values, view.time_us, view.grid_position, view.protected)
    same = (
        torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(before, after, strict=True)
    )
    assert all(same), "the view was changed"
    assert torch.equal(keep, policy.keep(view, slots)), "the same view gives the same choice"
    merged(policy, view, keep)
    return keep


def pass_peak(policy: Policy, view: View, slots: int) -> int:
    """The most bytes that choosing and merging allocate, the choice included, once everything lazy is there."""
    policy.merge(view, policy.keep(view, slots))
    return transient_peak(lambda: policy.merge(view, policy.keep(view, slots)))


def merged(policy: Policy, view: View, keep: torch.Tensor) -> View:
    """What the view is after merging: only kept tokens that are not protected have changed, and only where a policy says so."""
    after = replace(view, keys=view.keys.clone(), values=view.values.clone())
    policy.merge(after, keep)
    free = torch.zeros_like(view.protected).scatter_(1, keep, True) & ~view.protected
    for mine, theirs in ((view.keys, after.keys), (view.values, after.values)):
        moved = (mine.view(torch.uint8) != theirs.view(torch.uint8)).view(*mine.shape, -1).any(-1).any(-1)
        assert not bool((moved & ~free).any()), "a protected or forgotten token was changed"
        assert policy.needs.merging or not bool(moved.any())
        assert bool(theirs[moved].isfinite().all()) or not bool(mine[free].isfinite().all())
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CAPPED)
def test_whole_frames_in_every_dtype(name: str, dtype: torch.dtype, kernels: str) -> None:
    policy = policies.get(name)
    view = grid_view(12, 3, 4, recent=3, dtype=dtype)
    keep = check(policy, view, 7 * 12)
    for _ in range(2):
        view = thinned(view, keep, max(1, policy.recent(keep.shape[1] // 12)))
        keep = check(policy, view, view.tokens - 12)


@pytest.mark.parametrize("name", ANY_VIEW)
def test_what_streams_bring(name: str, kernels: str) -> None:
    policy = policies.get(name)
    check(policy, grid_view(9, 1, 1, recent=2), 5)  # frames of one token
    check(policy, grid_view(2, 3, 3, recent=1), 10)  # one frame beside the latest
    check(policy, with_text(grid_view(8, 3, 3, recent=2)), 40)
    check(policy, joined(grid_view(5, 2, 3), grid_view(4, 4, 2, recent=1)), 30)  # the frame size changed
    check(policy, joined(grid_view(5, 4, 4), grid_view(4, 2, 2, recent=1)), 30)
    view = grid_view(6, 2, 2, recent=2)
    check(policy, view, int(view.protected[0].sum()))  # room for nothing but the protected
    check(policy, view, view.tokens - 1)
    check(policy, replace(view, protected=torch.zeros_like(view.protected)), 7)  # text alone has no latest frame
    text = replace(
        view, grid_position=torch.full_like(view.grid_position, -1), protected=torch.zeros_like(view.protected)
    )
    check(policy, text, 7)
    check(policy, grid_view(6, 2, 2, heads=1), 9)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(ANY_VIEW),
    frames=st.integers(2, 10),
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    heads=st.integers(1, 3),
    recent=st.integers(1, 3),
    share=st.floats(0, 1),
    passes=st.integers(1, 3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_over_several_passes(
    name: str,
    frames: int,
    rows: int,
    cols: int,
    heads: int,
    recent: int,
    share: float,
    passes: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    recent = min(recent, frames - 1)
    view = grid_view(frames, rows, cols, recent=recent, heads=heads, seed=seed, dtype=dtype)
    for _ in range(passes):
        minimum = max(1, int(view.protected[0].sum()))
        if minimum >= view.tokens:
            return
        slots = minimum + int(share * (view.tokens - 1 - minimum))
        view = thinned(view, check(policies.get(name), view, slots), recent)


@pytest.mark.parametrize("name", CAPPED)
def test_a_score_that_is_no_number_breaks_nothing(name: str, kernels: str) -> None:
    """In float16 a norm may overflow, and an infinite key has no direction."""
    view = grid_view(12, 3, 4, recent=3)
    keys, values = view.keys.clone(), view.values.clone()
    keys[0, 5:40, 0], values[0, 20:140, 1], values[1, :140] = torch.nan, torch.nan, torch.inf
    keys[1, 3] = torch.inf
    check(policies.get(name), replace(view, keys=keys, values=values), 84)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(CAPPED),
    heads=st.integers(1, 4),
    width=st.sampled_from([16, 32, 64, 128]),
    rows=st.integers(1, 8),
    cols=st.integers(1, 8),
    frames=st.integers(8, 60),
    chunk=st.integers(16, 300),
    share=st.floats(0.55, 0.95),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    compiled=st.booleans(),
)
def test_scratch_of_any_shape_stays_within_what_is_declared(
    name: str,
    heads: int,
    width: int,
    rows: int,
    cols: int,
    frames: int,
    chunk: int,
    share: float,
    dtype: torch.dtype,
    compiled: bool,
) -> None:
    policy = policies.get(name)
    recent = max(1, policy.recent(frames))
    view = grid_view(
        frames, rows, cols, recent=recent, heads=heads, width=width, dtype=dtype, chunk=min(chunk, frames * rows * cols)
    )
    slots = min(frames - 1, max(2 * recent + 1, int(share * frames))) * view.block
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(dispatch, "kernels_enabled", False)
        peak = pass_peak(policy, view, slots)
    assert 0 < peak <= policy.scratch(Shape(heads, view.tokens, width, view.block, view.chunk))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(28, 4, 128, torch.bfloat16, 44, 12, 12), (4, 2, 32, torch.float32, 40, 4, 4)])
@pytest.mark.parametrize("name", CAPPED)
def test_scratch_stays_within_what_is_declared(name: str, shape: tuple, kernels: str) -> None:
    layers, heads, width, dtype, frames, rows, cols = shape
    policy = policies.get(name)
    recent = max(1, policy.recent(frames))
    view = grid_view(frames, rows, cols, recent=recent, heads=heads, width=width, dtype=dtype, layers=layers, chunk=20)
    slots = view.tokens * 3 // 4 // view.block * view.block
    peak = pass_peak(policy, view, slots)
    declared = policy.scratch(Shape(heads, view.tokens, width, view.block, view.chunk))
    assert 0 < peak <= declared
    cache = layers * heads * view.tokens * (2 * width * dtype.itemsize + 24)
    # A head's vectors of indices weigh more where a token has 2 KB in all; merging needs several.
    assert declared <= cache / (8 if policy.needs.merging and layers == 4 else 20)


def test_names_and_parameters() -> None:
    assert {"infinipot-v", "infinipot-v-released", "recent", "uniform", "random", "full"} <= {
        p.name for p in policies.available()
    }
    assert policies.get("infinipot-v", alpha=0.25).alpha == 0.25  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match=r"there are: .*infinipot-v"):
        policies.get("nonesuch")
    with pytest.raises(PolicyError, match="no parameter 'beta'; it has: alpha"):
        policies.get("infinipot-v", beta=1)
    for name, bad in [
        ("infinipot-v", {"alpha": 2}),
        ("infinipot-v", {"recent_share": 0}),
        ("infinipot-v", {"pooling": 4}),
        ("infinipot-v", {"thresholds": (3, 2, 1)}),
        ("infinipot-v-released", {"tar_ratio": 0}),
        ("infinipot-v-released", {"rows": 0}),
        ("recent", {"sink": -1}),
        ("recent", {"sink": 2.5}),
        ("random", {"seed": "x"}),
        ("infinipot-v", {"alpha": "half"}),
        ("infinipot-v", {"thresholds": 3}),
    ]:
        with pytest.raises(PolicyError, match=name):
            policies.get(name, **bad)
    with pytest.raises(PolicyError, match="cannot choose"):
        policies.get("full").keep(grid_view(2, 2, 2), 4)


@pytest.mark.parametrize("slots", [-1, 0, 5])
def test_keep_top_refuses_what_cannot_be_kept(slots: int, kernels: str) -> None:
    with pytest.raises(PolicyError, match="of 4 tokens"):
        keep_top(torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.bool), slots)


def test_the_compiled_loops_leave_the_processors_arithmetic_alone() -> None:
    """Linking with -ffast-math would make the whole process flush subnormal numbers to zero."""
    ops.status()
    assert float(torch.tensor(1e-40, dtype=torch.float32) * 0.5) > 0
    assert 5e-324 > 0


def test_a_broken_package_breaks_only_its_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from millpond.policies import registry

    found = {**registry.POLICIES.found}
    found["broken"] = EntryPoint("broken", "no.such.module:Thing", registry.POLICIES.group)
    found["wrong"] = EntryPoint("wrong", "math:pi", registry.POLICIES.group)
    monkeypatch.setattr(registry.POLICIES, "found", found)
    assert "recent" in [p.name for p in policies.available()]
    with pytest.raises(PolicyError, match=r"'broken' .* cannot be loaded"):
        policies.get("broken")
    with pytest.raises(PolicyError, match="not a millpond Policy"):
        policies.get("wrong")
    found["mine"] = EntryPoint("mine", "millpond.policies.methods.recent:Recent", registry.POLICIES.group)
    with pytest.raises(PolicyError, match=r"'mine' .* must have this as its class attribute"):
        policies.get("mine")


@pytest.mark.parametrize("order", [1, -1])
def test_no_package_can_take_the_name_of_a_built_in_policy(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    from importlib.metadata import EntryPoint

    from millpond.policies import registry

    both = [
        EntryPoint("recent", "millpond.policies.methods.recent:Recent", registry.POLICIES.group),
        EntryPoint("recent", "elsewhere:Recent", registry.POLICIES.group),
    ]
    monkeypatch.setattr("millpond.plugins.entry_points", lambda group: both[::order])
    fresh = Plugins(registry.POLICIES.group, Policy, "policy")
    assert fresh.found["recent"].module == "millpond.policies.methods.recent"


@pytest.mark.parametrize("value", ["nan", "1e999", "x"])
def test_a_parameter_that_is_no_number_is_told(value: str) -> None:
    with pytest.raises(PolicyError, match=r"infinipot-v: alpha must be a finite number, not \w+"):
        policies.read(f"infinipot-v:alpha={value}")
