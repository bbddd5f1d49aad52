"""The Triton kernel against the dense product: on a GPU where there is one, else in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/precision/test_triton_kernel.py

Torch imports Triton before any test runs, and Triton reads the variable then: it cannot be set in here.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from millpond.ops import bit_planes_triton  # noqa: E402
from millpond.precision.nested import NestedWeight, nest  # noqa: E402


def made(rows: int, columns: int) -> NestedWeight:
    rng = torch.Generator().manual_seed(0)
    found = nest(torch.randn(rows, columns, generator=rng), torch.rand(rows, columns, generator=rng))
    tables = {bits: table.to(DEVICE) for bits, table in found.tables.items()}
    return NestedWeight(found.planes.to(DEVICE), tables, columns)


def product(weight: NestedWeight, bits: int, x: torch.Tensor) -> torch.Tensor:
    return bit_planes_triton.product(weight.planes, weight.tables[bits], bits, weight.columns, x)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 128), (17, 7), (33, 129), (5, 257)])
@pytest.mark.parametrize("vectors", [1, 3])
def test_it_is_the_dense_product(rows: int, columns: int, vectors: int) -> None:
    weight = made(rows, columns)
    x = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for bits in range(3, 9):
        want = x.double() @ weight.dense(bits).double().T
        assert float((product(weight, bits, x) - want).norm() / want.norm()) <= 1e-5


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_it_reads_its_own_planes_only(bits: int) -> None:
    weight, x = made(20, 70), torch.ones(1, 70, device=DEVICE)
    poisoned = NestedWeight(weight.planes.clone(), weight.tables, 70)
    poisoned.planes[:, bits:] ^= 255
    assert torch.equal(product(poisoned, bits, x), product(weight, bits, x))


def test_no_vectors_give_no_products() -> None:
    assert product(made(4, 24), 4, torch.ones(0, 24, device=DEVICE)).shape == (0, 4)
