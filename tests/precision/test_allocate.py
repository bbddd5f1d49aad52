"""The integer programme against every assignment; real bytes under the limit."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.errors import BudgetError
from millpond.precision.allocate import allocate, linear_bytes
from millpond.precision.nested import nest
from tests.precision.test_nested import matrix

BIT_WIDTHS = (3, 4, 5, 6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_the_best_of_all_assignments_of_six_layers(seed: int, tightness: float) -> None:
    rng = np.random.default_rng(seed)
    errors = np.sort(rng.exponential(size=(6, 4)), axis=1)[:, ::-1].copy()
    nbytes = np.cumsum(rng.integers(1, 50, size=(6, 4)), axis=1)
    minimum, most = int(nbytes.min(1).sum()), int(nbytes.max(1).sum())
    limit = 7 + minimum + int(tightness * (most - minimum))
    found = allocate(errors, nbytes, BIT_WIDTHS, limit, rest=7)
    best = min(
        sum(errors[layer, choice] for layer, choice in enumerate(choices))
        for choices in product(range(4), repeat=6)
        if 7 + sum(nbytes[layer, choice] for layer, choice in enumerate(choices)) <= limit
    )
    assert found.error == pytest.approx(best, rel=1e-5)
    picked = [BIT_WIDTHS.index(bits) for bits in found.bits]
    assert found.nbytes == 7 + sum(nbytes[layer, choice] for layer, choice in enumerate(picked)) <= limit


def test_too_little_names_the_least_that_works() -> None:
    errors, nbytes = np.ones((2, 4)), np.array([[10, 20, 30, 40]] * 2)
    with pytest.raises(BudgetError, match="the minimum that works is 25 bytes") as caught:
        allocate(errors, nbytes, BIT_WIDTHS, 24, rest=5)
    assert caught.value.minimum == 25
    assert allocate(errors, nbytes, BIT_WIDTHS, 25, rest=5).bits == (3, 3)


@pytest.mark.parametrize("columns", [8, 13, 64])
def test_bytes_are_those_that_are_stored(columns: int) -> None:
    kept = nest(*matrix(20, columns)).kept(5, {3, 4, 5})
    assert (
        linear_bytes(20, columns, 5, (3, 4, 5))
        == kept.nbytes
        == sum(t.nbytes for t in (kept.planes, *kept.tables.values()))
    )
