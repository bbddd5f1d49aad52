"""Tensors that change their size under a cap, a byte a row: what can be exchanged, and that no live row is lost on the way."""

from dataclasses import dataclass

import pytest
import torch

from millpond.cache.storage.exchange import Exchange, Slab, attribute, feasible
from millpond.memory.ledger import Ledger
from millpond.memory.lines import STORAGE, Line


@dataclass
class Holder:
    tensor: torch.Tensor


def slabs(*sizes: tuple[int, int, int]) -> tuple[list[Holder], list[Slab]]:
    """Of one head and a byte a row: (old, new, live)."""
    holders = [Holder(torch.arange(1, old + 1, dtype=torch.uint8)[None]) for old, *_ in sizes]
    made = [attribute(one, "tensor", new, live) for one, (_, new, live) in zip(holders, sizes, strict=True)]
    return holders, made


@pytest.mark.parametrize(
    ("sizes", "least"),
    [
        (((10, 20, 4),), 30),  # both sizes are there for an instant
        (((10, 20, 4), (10, 20, 4)), 40),  # live rows in the other's tail, when two copies have no place
        (((10, 5, 1), (10, 20, 4)), 25),  # what shrinks first makes room, and its tail holds four rows: 5 + 20
        (((10, 5, 4), (10, 20, 4)), 35),  # its tail holds one
        (((10, 5, 5), (10, 20, 9)), 35),  # no tail is left for nine rows: 5 + 10 + 20
        (((10, 5, 4), (10, 6, 6)), 21),  # the first parks in the second's tail of four; then 5 + 10 + 6
        (((10, 10, 4), (10, 12, 6)), 22),
    ],
)
def test_what_can_be_exchanged_is_and_every_live_row_stays(sizes: tuple[tuple[int, int, int], ...], least: int) -> None:
    held = sum(old for old, *_ in sizes)
    limits = [limit for limit in range(held, 99) if feasible(slabs(*sizes)[1], held, limit)]
    assert limits == list(range(least, 99))
    assert feasible(slabs(*sizes)[1], held, None)
    holders, made = slabs(*sizes)
    ledger = Ledger(least, [Line(STORAGE, 0, least, "")])
    exchange = Exchange(made, ledger, least, lambda: sum(one.tensor.nbytes for one in holders))
    for step, at in ((exchange.forth, 1), (exchange.back, 0), (exchange.forth, 1)):
        step()
        assert [one.tensor.shape[1] for one in holders] == [size[at] for size in sizes]
        for one, (*_, live) in zip(holders, sizes, strict=True):
            assert one.tensor[0, :live].tolist() == list(range(1, live + 1))
        assert ledger.peak <= least
