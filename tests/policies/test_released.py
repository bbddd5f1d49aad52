"""InfiniPot-V's released selection against the rule written straight down: bit for bit, pass after pass."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import PolicyError, policies
from millpond.policies.base import View
from tests.policies.views import grid_view, joined, thinned, with_text


def straightforward(
    keys: torch.Tensor,
    values: torch.Tensor,
    size: int,
    kept: int,
    *,
    tar_ratio: float = 0.5,
    query_ratio: float = 0.25,
    kernel: int = 1,
    axes: int = 0,
    rows: int = 1,
) -> torch.Tensor:
    """The rule with its r x f x p x D product: [H, n, D] -> int64 [H, kept x size].

    `axes`: what the kernel runs over: 1 the stream, 2 rows and columns, 3 frames, rows and columns.
    """
    heads, tokens, width = keys.shape
    by_value = round((1 - tar_ratio) * kept * size)
    recent = int(tokens // size * query_ratio) * size
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-9)
    latest = unit[:, -recent:].reshape(heads, -1, 1, size, width)
    past = unit[:, :-recent].reshape(heads, 1, -1, size, width)
    scores = -(latest * past).sum(-1).mean(1).reshape(heads, -1)
    chosen = scores.topk(kept * size - by_value - recent, dim=-1).indices
    tail = torch.arange(tokens - recent, tokens).expand(heads, -1)
    norms = values.norm(dim=-1)
    if kernel > 1:
        grid = (tokens,) if axes == 1 else (tokens // size, rows, size // rows)
        norms = window_means(norms.reshape(heads, *grid), kernel, axes).reshape(heads, -1)
    norms = norms.scatter(1, torch.cat([chosen, tail], 1), float(norms.max()) + 1)
    return norms.topk(kept * size, dim=-1).indices.sort(dim=-1).values


def window_means(values: torch.Tensor, kernel: int, axes: int) -> torch.Tensor:
    """Means over windows of the last axes, [H, ...], the zeros of the padding counted; one position at a time."""
    reach, shape = kernel // 2, values.shape
    padded = torch.nn.functional.pad(values.double(), (reach, reach) * axes)
    out = torch.zeros(shape, dtype=torch.float64)
    for shift in product(range(kernel), repeat=axes):
        at = tuple(slice(by, by + length) for by, length in zip(shift, shape[-axes:], strict=True))
        out += padded[(..., *at)]
    return (out / kernel**axes).float()


def streamed(view: View, keep: torch.Tensor, newer: View) -> View:
    """The next pass: what was kept, with newer frames behind it."""
    rest = thinned(view, keep, 1)
    times = torch.cat([rest.time_us - 10**10, newer.time_us], 1)
    return replace(joined(rest, newer), time_us=times, block=newer.block)


# By layer of four: the kernel and what it runs over, in the head and in the first release. On this grid of 3 x 4 the head's shrink to 3.
@pytest.mark.parametrize(
    ("release", "layer", "kernel", "axes"),
    [
        ("2026-01", None, 1, 0),
        ("2026-01", 0, 3, 3),
        ("2026-01", 1, 3, 2),
        ("2026-01", 2, 3, 1),
        ("2026-01", 3, 1, 0),
        ("2025-11", 0, 7, 2),
        ("2025-11", 1, 5, 2),
        ("2025-11", 2, 3, 1),
        ("2025-11", 3, 1, 0),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_round_after_round(seed: int, release: str, layer: int | None, kernel: int, axes: int) -> None:
    """Survivors are laid out as frames again although they are none."""
    size, kept = 12, 9
    policy = policies.get("infinipot-v-released", adaptive_pooling=layer is not None, rows=3, release=release)
    random = torch.Generator().manual_seed(seed)
    shape = {"recent": 3, "heads": 3, "width": 16, "layer": layer or 0}
    view = grid_view(12, 3, 4, seed=seed, **shape)
    for _ in range(6):
        keep = policy.keep(view, kept * size)
        assert torch.equal(keep, straightforward(view.keys, view.values, size, kept, kernel=kernel, axes=axes, rows=3))
        view = streamed(view, keep, grid_view(3, 3, 4, seed=int(torch.randint(10**6, (1,), generator=random)), **shape))


# The largest odd number that frames, rows and columns all have, at most the layer's own: (frames, rows, cols), layer, kernel, axes.
@pytest.mark.parametrize(
    ("grid", "layer", "kernel", "axes"),
    [
        ((8, 8, 7), 0, 7, 3),
        ((6, 8, 8), 0, 5, 3),
        ((8, 8, 6), 1, 5, 2),
        ((4, 9, 9), 1, 3, 2),
        ((8, 2, 9), 0, 1, 3),
        ((8, 2, 9), 2, 3, 1),
    ],
)
def test_the_heads_kernels_shrink_on_small_grids(
    grid: tuple[int, int, int], layer: int, kernel: int, axes: int
) -> None:
    frames, rows, cols = grid
    view = grid_view(*grid, recent=frames // 4, width=16, layer=layer)
    keep = policies.get("infinipot-v-released", adaptive_pooling=True, rows=rows).keep(view, (frames - 1) * rows * cols)
    size = rows * cols
    expected = straightforward(view.keys, view.values, size, frames - 1, kernel=kernel, axes=axes, rows=rows)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_models_of_few_layers_pool_as_the_first_of_four(layers: int) -> None:
    head = policies.get("infinipot-v-released", adaptive_pooling=True, rows=3)
    for layer in range(layers):
        view = grid_view(12, 3, 4, recent=3, width=16, layer=layer)
        assert torch.equal(head.keep(replace(view, layers=layers), 108), head.keep(replace(view, layers=4), 108))
    first = policies.get("infinipot-v-released", adaptive_pooling=True, rows=3, release="2025-11")
    with pytest.raises(PolicyError, match=f"{layers} layers"):
        first.keep(replace(view, layers=layers), 108)


@pytest.mark.parametrize("large", [2.0**23, 2.0**25, 1e30, torch.inf, torch.nan])
def test_the_recent_stay_also_where_the_largest_norm_plus_one_is_no_larger(large: float) -> None:
    view = grid_view(8, 2, 2, recent=2)
    values = torch.ones_like(view.values)
    values[:, :8, 0] = large
    keep = policies.get("infinipot-v-released").keep(replace(view, values=values), 20)
    assert bool(torch.isin(torch.arange(24, 32), keep[0]).all())
    if large == 2.0**23:  # still larger by one: as it is released
        assert torch.equal(keep, straightforward(view.keys, values, 4, 5))


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(4, 120),
    grid=st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (1, 5), (3, 3), (3, 4), (5, 5), (7, 7), (8, 8)]),
    width=st.sampled_from([8, 16, 32]),
    heads=st.integers(1, 3),
    chunk=st.sampled_from([1, 16, 100, 512]),
    share=st.floats(0.5, 0.99),
    rounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_bit_of_it(
    frames: int,
    grid: tuple[int, int],
    width: int,
    heads: int,
    chunk: int,
    share: float,
    rounded: bool,
    seed: int,
) -> None:
    """Many recent frames make long sums, whose last bit depends on the order; rounded numbers make ties."""
    size = grid[0] * grid[1]
    frames = min(frames, max(4, 1500 // size))
    view = grid_view(frames, *grid, recent=max(1, frames // 4), heads=heads, width=width, chunk=chunk, seed=seed)
    if rounded:
        view = replace(view, keys=view.keys.round(), values=view.values.round())
    kept = min(frames - 1, max(2 * (frames // 4) + 1, round(share * frames)))
    keep = policies.get("infinipot-v-released").keep(view, kept * size)
    assert torch.equal(keep, straightforward(view.keys, view.values, size, kept))


def test_scores_have_the_same_bits_however_they_are_cut() -> None:
    """A selection hides most differences in a last bit; the scores show each of them."""
    from millpond.policies.methods.infinipot_v_released import InfiniPotVReleased

    for seed, (size, frames) in enumerate(product((1, 2, 3, 5, 9, 12, 25, 49, 64, 144), (4, 23, 44, 81))):
        recent = frames // 4 * size
        keys = grid_view(frames, 1, size, heads=1, width=16, seed=seed).keys[0]
        unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-9)
        pairs = unit[-recent:].reshape(-1, 1, size, 16) * unit[:-recent].reshape(1, -1, size, 16)
        expected = -pairs.sum(-1).mean(0).reshape(-1)
        for chunk in (1, 130, 512):
            assert torch.equal(InfiniPotVReleased._redundancy(keys, size, recent, chunk), expected), (size, frames)


@pytest.mark.parametrize(("tar_ratio", "kept", "size"), [(0.55, 5, 6), (0.3, 5, 9), (0.55, 10, 3), (0.65, 10, 9)])
def test_budgets_are_rounded_in_the_released_order(tar_ratio: float, kept: int, size: int) -> None:
    """(1 - a) C p is not (1 - a) (C p) in floating point: one token more or less for TaR."""
    assert round((1 - tar_ratio) * kept * size) != round((1 - tar_ratio) * (kept * size))
    ratios = {"tar_ratio": tar_ratio, "query_ratio": 1.5 / (kept + 2)}  # one recent frame
    policy = policies.get("infinipot-v-released", **ratios)
    for seed in range(20):
        view = grid_view(kept + 2, 1, size, recent=1, seed=seed)
        expected = straightforward(view.keys, view.values, size, kept, **ratios)
        assert torch.equal(policy.keep(view, kept * size), expected)


def test_where_the_released_code_crashes_there_is_one_clear_line() -> None:
    released = policies.get("infinipot-v-released")
    view = grid_view(8, 2, 2, recent=2)
    for bad, slots, words in [
        (view, 15, "whole frames"),
        (replace(view, block=3), 15, "whole frames"),
        (grid_view(3, 2, 2), 8, "less than one"),
        (view, 4, "cannot hold"),
        (with_text(view), 16, "frames only"),
    ]:
        with pytest.raises(PolicyError, match=words) as caught:
            released.keep(bad, slots)
        assert "\n" not in str(caught.value)
    pooled = policies.get("infinipot-v-released", adaptive_pooling=True, rows=2)
    for layers in (5, 30, 42):
        # In the first layer already: the released code finds out in the last ones, when the others have been cut.
        with pytest.raises(PolicyError, match=f"{layers} layers"):
            pooled.keep(replace(view, layers=layers, layer=0), 16)
    with pytest.raises(PolicyError, match="rows"):
        policies.get("infinipot-v-released", adaptive_pooling=True, rows=3).keep(view, 16)


def test_it_differs_from_the_papers_rule_from_the_second_pass_on() -> None:
    """The reason for two policies: equal in the first pass, apart in the second."""
    paper, released = policies.get("infinipot-v", pooling=1, tar_first=0.0), policies.get("infinipot-v-released")
    shape = {"recent": 3, "heads": 2, "width": 16}
    view = grid_view(12, 3, 4, seed=1, **shape)
    keep = released.keep(view, 108)
    assert torch.equal(keep, paper.keep(view, 108))
    second = streamed(view, keep, grid_view(3, 3, 4, seed=2, **shape))
    assert not torch.equal(released.keep(second, 108), paper.keep(second, 108))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_over_frames_works_in_half_precision_too(dtype: torch.dtype) -> None:
    """torch has no pooling over three axes in half precision on a CPU."""
    policy = policies.get("infinipot-v-released", adaptive_pooling=True, rows=3)
    view = grid_view(8, 3, 4, recent=2, dtype=dtype, layer=0)
    keep = policy.keep(view, 60)
    exact = policy.keep(replace(view, keys=view.keys.float(), values=view.values.float()), 60)
    common = sum(len(set(a) & set(b)) for a, b in zip(keep.tolist(), exact.tolist(), strict=True))
    assert common >= 0.9 * keep.numel()
