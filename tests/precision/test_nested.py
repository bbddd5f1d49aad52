"""The format: clusters are optimal, planes are nested, a bit-width reads its own planes only, the packed product is the dense one."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import ops
from millpond.errors import PrecisionError
from millpond.ops import bit_planes, dispatch
from millpond.precision.nested import NestedWeight, nest, product


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of numbers runs with the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "kernels_enabled", False)
    elif not ops.status().endswith(".so"):
        pytest.skip(ops.status())


def matrix(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng), torch.rand(rows, columns, generator=rng)


def cost(values: np.ndarray, by: np.ndarray) -> float:
    return float((by * (values - np.average(values, weights=by)) ** 2).sum()) if len(values) else 0.0


def test_the_seed_is_the_best_of_all_clusterings(either: None) -> None:
    w, g = matrix(5, 11)
    found = nest(w, g)
    for row in range(5):
        order = np.argsort(w[row].numpy())
        values, by = w[row].numpy()[order].astype(np.float64), g[row].numpy()[order].astype(np.float64)
        best = min(
            sum(cost(values[a:b], by[a:b]) for a, b in zip((0, *cuts), (*cuts, 11), strict=True))
            for cuts in combinations(range(1, 11), 7)
        )
        labels = found.labels(3)[row].numpy()[order]
        ours = sum(cost(values[labels == c], by[labels == c]) for c in range(8))
        assert ours == pytest.approx(best, rel=1e-4, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 99))
def test_labels_nest_and_tables_ascend_and_more_bits_err_less(rows: int, columns: int, seed: int) -> None:
    w, g = matrix(rows, columns, seed)
    found = nest(w, g)
    whole = found.labels(8)
    before = float("inf")
    for bits in range(3, 9):
        assert torch.equal(found.labels(bits), whole >> (8 - bits))
        table = found.tables[bits].float()
        assert bool((table[:, 1:] >= table[:, :-1]).all())
        error = float((g * (w - found.dense(bits)) ** 2).sum())
        assert error <= before * (1 + 1e-3) + 1e-5  # a table in float16 may cost what a split of two equals gains
        before = error


def test_a_width_reads_its_own_planes_only(either: None) -> None:
    found = nest(*matrix(9, 70))
    x = torch.randn(2, 70)
    for bits in range(3, 8):
        poisoned = NestedWeight(found.planes.clone(), found.tables, 70)
        poisoned.planes[:, bits:] = torch.randint(0, 256, poisoned.planes[:, bits:].shape, dtype=torch.uint8)
        assert torch.equal(poisoned.dense(bits), found.dense(bits))
        assert torch.equal(product(poisoned, bits, x), product(found, bits, x))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 64, 101])
@pytest.mark.parametrize("vectors", [1, 3, 9])
def test_the_packed_product_is_the_dense_one(
    either: None, monkeypatch: pytest.MonkeyPatch, columns: int, vectors: int
) -> None:
    monkeypatch.setattr(bit_planes, "_ROWS_AT_ONCE", 5)
    found = nest(*matrix(12, columns))
    x = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(1))
    for bits in range(3, 9):
        want = (x.double() @ found.dense(bits).double().T).float()
        got = product(found, bits, x)
        assert float((got - want).norm() / want.norm()) <= 1e-5
        assert product(found, bits, x.bfloat16()).dtype == torch.bfloat16


def test_several_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nest(*matrix(130, 64))
    x = torch.randn(1, 64)
    one = product(found, 4, x)
    monkeypatch.setattr(bit_planes, "_WEIGHTS_A_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(product(found, 4, x), one)


def test_what_is_dropped_is_freed() -> None:
    found = nest(*matrix(64, 64))
    kept = found.kept(4, {3, 4})
    assert kept.nbytes == 64 * (4 * 8 + (8 + 16) * 2)
    assert kept.planes.untyped_storage().nbytes() == 64 * 4 * 8
    assert torch.equal(kept.dense(4), found.dense(4))
    with pytest.raises(PrecisionError, match="between 3 and 4 bits, not 5"):
        kept.dense(5)
    with pytest.raises(PrecisionError, match="no table for 4 bits"):
        product(found.kept(4, {3}), 4, torch.zeros(1, 64))


def test_what_cannot_be_quantized_is_refused() -> None:
    w, g = matrix(4, 8)
    with pytest.raises(PrecisionError, match="must agree"):
        nest(w, g[:, :7])
    with pytest.raises(PrecisionError, match="between 3 and 8"):
        nest(w, g, low=2)
    with pytest.raises(PrecisionError, match="finite"):
        nest(w * float("inf"), g)
    with pytest.raises(PrecisionError, match="negative"):
        nest(w, -g)
    with pytest.raises(PrecisionError, match="too large"):
        nest(w * 1e6, g)
