"""The compiled loops and the torch code behind them say the same, at every width and at every odd end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import millpond
from millpond import native
from millpond.native import build
from millpond.policies.base import keep_top
from millpond.policies.methods.infinipot_v import InfiniPotV
from millpond.policies.scoring.keys import distinctiveness
from millpond.positions import Rope
from tests.policies.views import grid_view

compiled_only = pytest.mark.skipif(native._library()[0] is None, reason=f"no compiled kernels: {native.status()}")


@contextmanager
def in_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda source=None: (None, "switched off"))
        yield


def both(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    compiled = run()
    with in_torch():
        return compiled, run()


@compiled_only
@pytest.mark.parametrize("source", sorted(Path(millpond.__file__).parent.rglob("*.cpp")), ids=lambda path: path.name)
def test_every_file_compiles_where_one_does(source: Path) -> None:
    library, why = build.compiled(source)
    assert library is not None, why


@compiled_only
@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan]), st.floats(width=32)),
        min_size=1,
        max_size=40,
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_best_are_the_same_ties_and_oddities_included(scores: list[float], share: float, seed: int) -> None:
    slots = max(1, round(share * len(scores)))
    rows = torch.tensor([scores, scores[::-1]])
    protected = torch.zeros(rows.shape, dtype=torch.bool)
    protected[:, torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[: slots // 2]] = True
    compiled, plain = both(lambda: keep_top(rows.clone(), protected, slots))
    assert torch.equal(compiled, plain)
    # An infinite score counts for less than protection.
    finite = rows.masked_fill(rows.isnan(), -torch.inf).clamp(max=torch.finfo(torch.float32).max)
    ranked = finite.masked_fill(protected, torch.inf)
    for head, row in enumerate(ranked.tolist()):
        expected = sorted(sorted(range(len(row)), key=lambda n: (-row[n], n))[:slots])
        assert plain[head].tolist() == expected


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 31, 32, 40, 64, 80, 96, 128, 130])
def test_the_selection_of_infinipot_v_at_any_width(width: int, dtype: torch.dtype) -> None:
    view = grid_view(9, 3, 4, recent=2, width=width, dtype=dtype)
    for alpha in (0.0, 1.0) if width > 1 else (0.0,):  # the cosines of single numbers are all 1 or -1
        assert torch.equal(*both(lambda alpha=alpha: InfiniPotV(alpha=alpha, pooling=1).keep(view, 60)))


@compiled_only
def test_the_selection_of_infinipot_v_takes_oddities_as_torch_does() -> None:
    view = grid_view(40, 5, 5, recent=2)  # more tokens than are sorted at once
    for number in (torch.nan, torch.inf, 0.0):
        odd = replace(view, keys=view.keys.clone(), values=view.values.clone())
        odd.keys[0, 30:60], odd.values[0, 100:130] = number, number
        assert torch.equal(*both(lambda odd=odd: InfiniPotV(pooling=1).keep(odd, 500)))


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "half"), [(2, 1), (14, 7), (64, 32), (128, 64), (80, 20)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_turning_at_any_width(width: int, half: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(width)
    axis = torch.randint(0, 3, (half,), generator=made)
    rope = Rope(inv_freq=1 / 10_000 ** (torch.arange(half) / half), axis=axis, limit=32_768)
    keys = torch.randn(*shape, 23, width, generator=made, dtype=dtype)
    keys[..., 5, 0] = torch.nan
    delta = torch.randint(-30_000, 30_000, (3, 23), generator=made).T
    delta[8:12] = delta[8]
    delta[2] = 0

    def turned() -> torch.Tensor:
        out = keys.clone()
        rope.rotate_(out, delta, chunk=10)
        return out

    compiled, plain = both(turned)
    # One rounding of a bfloat16 number may fall the other way.
    close = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"atol": 1e-6}
    assert torch.allclose(compiled, plain, equal_nan=True, **close)  # type: ignore[arg-type]
    assert torch.equal(compiled.isnan(), plain.isnan())
    assert not torch.equal(compiled[..., 6, :], keys[..., 6, :])
    assert torch.equal(compiled[..., 2, :], keys[..., 2, :])


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_a_cut_layer_turn_where_they_lie(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rope = Rope(inv_freq=1 / 10_000 ** (torch.arange(8) / 8), axis=torch.zeros(8, dtype=torch.int64), limit=32_768)
    compiled, plain = whole.clone(), whole.clone()
    rope.rotate_(compiled[:, 4:20], torch.full((1, 1), 7).expand(16, 1))
    for head in plain:
        rope.rotate_(head[4:20], torch.full((16, 1), 7))
    assert torch.equal(compiled, plain)
    assert torch.equal(compiled[:, 20:], whole[:, 20:])


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 16, 31, 64, 130])
def test_distinctiveness_at_any_width(width: int, dtype: torch.dtype) -> None:
    keys = grid_view(9, 3, 4, recent=2, width=width, dtype=dtype).keys[1]
    keys = torch.cat([keys, torch.zeros(1, width, dtype=dtype)])

    def scores() -> torch.Tensor:
        out = torch.empty(len(keys))
        distinctiveness(keys, 10, out)
        return out

    assert torch.allclose(*both(scores), atol=1e-6)


@compiled_only
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    tokens=st.integers(1, 70),
    prompt=st.integers(0, 20),
    width=st.sampled_from([1, 8, 15, 32]),
    counted=st.floats(0, 1),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_compiled_attention_is_the_softmax(
    rows: int,
    tokens: int,
    prompt: int,
    width: int,
    counted: float,
    scale: float,
    causal: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    keys = (torch.randn(prompt + tokens, width, generator=rng) * scale).to(dtype)
    queries, some = torch.randn(rows, width, generator=rng), max(1, round(counted * tokens))
    last = torch.randint(0, tokens, (rows,), generator=rng) if causal else None
    scores = queries.double() @ keys.double().T
    if last is not None:
        scores[:, prompt:].masked_fill_(torch.arange(tokens) > last[:, None], -torch.inf)
    share = scores.softmax(1)[:, prompt : prompt + some]
    sums, variances = torch.full((2, tokens), 2.0)
    ahead = keys[:prompt], keys[prompt:]
    assert native.attention(queries, *ahead, last=last, sums=sums, variances=variances, counted=some) is not None
    spread = share.var(0) if rows > 1 else torch.zeros(some, dtype=torch.float64)
    close = {"rtol": 1e-4, "atol": 2e-5} if scale > 1 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(sums[:some].double(), 2 + share.sum(0), **close)
    torch.testing.assert_close(variances[:some].double(), 2 + spread, **close)
    assert torch.equal(sums[some:], torch.full((tokens - some,), 2.0))
    totals = native.attention(queries, *ahead, last=last, counted=some)
    assert totals is not None
    assert totals[0] == pytest.approx(float(torch.special.entr(share).sum()), rel=1e-3, abs=1e-4)
    assert totals[1] == pytest.approx(float(spread.sum()), rel=1e-3, abs=1e-5)


@compiled_only
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 3), (12, 12), (27, 15)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_pooling_of_any_grid(grid: tuple[int, int], kernel: int) -> None:
    view = grid_view(5, *grid, recent=1)
    assert torch.equal(*both(lambda: InfiniPotV(alpha=0, pooling=kernel).keep(view, view.tokens // 2)))  # type: ignore[arg-type]


def test_without_a_home_folder_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    library, why = build.compiled.__wrapped__(native._KERNELS)
    assert library is None
    assert "could not be built" in why or "no C++ compiler" in why
