"""The compiled loops and the torch code behind them say the same, at every width and at every odd end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import native
from millpond.native import build
from millpond.policies.base import keep_top
from millpond.policies.infinipot_v import temporal_redundancy, value_norms
from millpond.policies.pooling import pool_over_grid
from tests.policies.views import grid_view

compiled_only = pytest.mark.skipif(native._library()[0] is None, reason=f"no compiled kernels: {native.status()}")


@contextmanager
def in_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda: (None, "switched off"))
        yield


def both(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    compiled = run()
    with in_torch():
        return compiled, run()


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
def test_norms_and_redundancy_at_any_width(width: int, dtype: torch.dtype) -> None:
    view = grid_view(9, 3, 4, recent=2, width=width, dtype=dtype)
    assert torch.allclose(*both(lambda: value_norms(view)), rtol=1e-5)
    assert torch.allclose(*both(lambda: temporal_redundancy(view)), atol=1e-6)


@compiled_only
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 3), (12, 12), (27, 15)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_pooling_of_any_grid(grid: tuple[int, int], kernel: int) -> None:
    view = grid_view(5, *grid)

    def pooled() -> torch.Tensor:
        norms = value_norms(view)
        pool_over_grid(norms, view, kernel)
        return norms

    assert torch.allclose(*both(pooled), rtol=1e-5)


def test_without_a_home_folder_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    library, why = build.compiled.__wrapped__(native._SOURCE)
    assert library is None
    assert "could not be built" in why or "no C++ compiler" in why
