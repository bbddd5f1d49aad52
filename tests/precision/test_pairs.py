"""Training of the pairs: the mean is met, linears that gain more get more, and the model comes back unharmed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from millpond import precision
from millpond.errors import BudgetError
from millpond.precision.allocate import water_filling
from millpond.precision.decoder import linears
from millpond.precision.pairs import Pair, _meeting, _Mixed, _pair, train_pairs
from tests.precision.models import runs


def mean_bits(model: torch.nn.Module, pairs: dict[str, Pair]) -> float:
    sizes = {name: linear.size for name, linear in linears(model)}
    bits = {name: pair.share_low * pair.low + (1 - pair.share_low) * pair.high for name, pair in pairs.items()}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("target", [3.0, 3.25, 4.0, 4.75, 6.0])
def test_pairs_are_adjacent_and_their_mean_is_the_target(stored: Path, target: float) -> None:
    model = precision.load(stored)
    before = dict(linears(model))
    pairs = train_pairs(model, runs(samples=2), target, quiet=True)
    assert {name: id(linear) for name, linear in linears(model)} == {name: id(part) for name, part in before.items()}
    assert all(pair.high - pair.low in (0, 1) and pair.low >= 3 and pair.high <= 8 for pair in pairs.values())
    # Shares below one in a hundred are rounded away, which moves a linear by a hundredth of a bit at most.
    assert mean_bits(model, pairs) == pytest.approx(target, abs=0.01)


def test_a_linear_that_matters_more_gets_more_bits(stored: Path) -> None:
    model = precision.load(stored)
    # The second layer's linears read at every bit-width what they are at the smallest: more bits gain nothing there.
    idle = [name for name, _ in linears(model) if name.startswith("1.")]
    for name, linear in linears(model):
        if name in idle:
            for bits in linear.bit_widths[1:]:
                finer = getattr(linear, f"table_{bits}")
                coarse = getattr(linear, f"table_{linear.bit_widths[0]}")
                finer.copy_(coarse.repeat_interleave(finer.shape[1] // coarse.shape[1], dim=1))
    ids = runs(samples=1).repeat(40, 1)
    with torch.no_grad():  # what the widest reading says is what the text says, so that bit-width pays
        ids[:, 1:] = model(ids[:1]).logits[0, :-1].argmax(-1)
    pairs = train_pairs(model, ids, 4.0, alpha=1.0, lr=5e-2, quiet=True)
    own = {name: pair.share_low * pair.low + (1 - pair.share_low) * pair.high for name, pair in pairs.items()}
    busy = [bits for name, bits in own.items() if name not in idle]
    assert sum(busy) / len(busy) > max(own[name] for name in idle)


def test_the_soft_mixture_is_the_mean_of_its_two_widths(stored: Path) -> None:
    _, linear = next(iter(linears(precision.load(stored))))
    x = torch.randn(5, linear.columns, generator=torch.Generator().manual_seed(0))
    mixed = _Mixed(linear, 6, z=0.3)
    bits = 3 + 3 * torch.sigmoid(torch.tensor(0.3))
    low = int(bits)
    share_low = 1 - (float(bits) - low)
    want = share_low * x @ linear.weight.dense(low).T + (1 - share_low) * x @ linear.weight.dense(low + 1).T
    assert torch.allclose(mixed(x), want, atol=1e-5)
    mixed(x).square().sum().backward()
    assert mixed.z.grad is not None
    assert float(mixed.z.grad.abs()) > 0
    fixed = _Mixed(linear, 3, z=0.3)
    assert torch.allclose(fixed(x), x @ linear.weight.dense(3).T, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(3, 6), st.integers(1, 10_000)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_every_mean_that_the_widths_allow_is_met(parts: list[tuple[float, int, int]], share: float) -> None:
    z, most, sizes = (torch.tensor(column, dtype=torch.float64) for column in zip(*parts, strict=True))
    target = 3 + share * (float((most * sizes).sum() / sizes.sum()) - 3)
    found = _meeting(z, most, sizes, target)
    assert bool(((found >= 3) & (found <= most)).all())
    assert float((found * sizes).sum() / sizes.sum()) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize(
    ("precision", "most", "pair"),
    [
        (3.0, 6, Pair(3, 3, 1.0)),
        (3.005, 6, Pair(3, 3, 1.0)),
        (4.25, 6, Pair(4, 5, 0.75)),
        (4.995, 6, Pair(5, 5, 1.0)),
        (6.0, 6, Pair(6, 6, 1.0)),
        (3.0, 3, Pair(3, 3, 1.0)),
    ],
)
def test_shares_near_the_ends_are_fixed_widths(precision: float, most: int, pair: Pair) -> None:
    found = _pair(precision, most)
    assert (found.low, found.high) == (pair.low, pair.high)
    assert found.share_low == pytest.approx(pair.share_low)


def test_the_least_memory_leaves_three_bits_everywhere(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    with pytest.raises(BudgetError) as caught:
        precision.calibrate(folder, runs(), [3.0], memory=1000, quiet=True)
    made = precision.calibrate(folder, runs(), [3.0], memory=caught.value.minimum, quiet=True)
    assert set(made.max_bits.values()) == {3}
    assert all(choice.low == choice.high == 3 for choice in made.targets[3.0].values())
    model = precision.load(folder, memory=caught.value.minimum, target_bits=3.0)
    precision.perplexity(model, runs(samples=1))
    assert model.effective_bits() == 3.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 50)), min_size=2, max_size=8), st.floats(4.2, 4.8))
def test_the_start_has_equal_slopes(parts: list[tuple[float, int]], target: float) -> None:
    """With errors c 4^-b the levels are known: log4 of c / size, shifted to the mean."""
    logs, sizes = (np.array(column, dtype=float) for column in zip(*parts, strict=True))
    bit_widths = np.arange(3, 7)
    errors = sizes[:, None] * np.exp2(logs)[:, None] * 4.0 ** -bit_widths[None]
    shift = target - (logs / 2 * sizes).sum() / sizes.sum()
    want = logs / 2 + shift
    assume(bool(((want > 3.02) & (want < 5.98)).all()))
    found = water_filling(errors, sizes, tuple(bit_widths), np.full(len(sizes), 6.0), target)
    assert np.abs(found - want).max() < 0.025


def test_the_start_stays_within_the_widths_kept() -> None:
    errors = np.array([[8.0, 2.0, 0.5, 0.1], [800.0, 200.0, 50.0, 10.0]])
    found = water_filling(errors, np.array([1.0, 1.0]), (3, 4, 5, 6), np.array([6.0, 4.0]), 4.0)
    assert found[1] == 4.0
    assert found.mean() == pytest.approx(4.0, abs=0.02)


def test_a_few_steps_stay_near_the_start(stored: Path) -> None:
    model = precision.load(stored)
    names = [name for name, _ in linears(model)]
    start = {name: 3.2 if index % 2 else 5.7 for index, name in enumerate(names)}
    pairs = train_pairs(model, runs(samples=1), 4.5, start=start, quiet=True)
    assert {pairs[name].low for name in names[0::2]} != {pairs[name].low for name in names[1::2]}
    assert mean_bits(model, pairs) == pytest.approx(4.5, abs=0.01)
