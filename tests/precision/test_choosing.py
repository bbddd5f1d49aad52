"""The compiled decisions and the torch code behind them say the same."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from millpond.precision import choosing
from millpond.precision.calibration import Choice
from millpond.precision.choosing import Chooser, plain_norm

compiled_only = pytest.mark.skipif(
    choosing.compiled(choosing._KERNEL)[0] is None, reason="no compiled kernels on this machine"
)


def in_torch(choices: list[Choice], norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "compiled", lambda source: (None, "switched off"))
        return torch.stack([*Chooser(choices, x.shape[1], norm)(x)])


@compiled_only
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    kinds=st.lists(st.sampled_from([0, 1, 3, 8, 11, 24]), min_size=1, max_size=4),
    normed=st.booleans(),
)
def test_compiled_and_torch_decide_alike(seed: int, rows: int, columns: int, kinds: list[int], normed: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=rng)
    norm = LlamaRMSNorm(columns) if normed else None
    if norm is not None:
        norm.weight.data = torch.rand(columns, generator=rng) + 0.5
    read = x if norm is None else norm(x).detach()
    choices, estimates = [], []
    for kind in kinds:
        projection = torch.randn(kind, columns, generator=rng).bfloat16() if kind else None
        free = Choice(3, 4, slope=0.7, intercept=-0.2, projection=projection)
        estimate = free.estimate(read)
        # Between two estimates, never at one: rounding must not decide.
        ordered = sorted([*estimate.tolist(), float(estimate.min()) - 1, float(estimate.max()) + 1])
        gap = max(itertools.pairwise(ordered), key=lambda pair: pair[1] - pair[0])
        choices.append(Choice(3, 4, sum(gap) / 2, 0.7, -0.2, projection))
        estimates.append(estimate > choices[-1].threshold)
    decided = torch.stack([*Chooser(choices, columns, norm)(x)])
    assert decided.dtype == torch.bool
    assert torch.equal(decided, torch.stack(estimates))
    assert torch.equal(decided, in_torch(choices, norm, x))


@pytest.mark.parametrize("limit", [float("inf"), float("-inf")])
def test_infinite_thresholds_decide_without_exception(limit: float) -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)) * 1e6
    choices = [Choice(3, 4, limit, slope=1.0), Choice(3, 4, limit, projection=torch.ones(8, 12).bfloat16())]
    assert bool((torch.stack([*Chooser(choices, 12)(x)]) == (limit < 0)).all())
    assert bool((in_torch(choices, None, x) == (limit < 0)).all())


class OnePlus(LlamaRMSNorm):
    """Gemma's: the weight is an offset from one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


def test_another_kind_of_norm_is_called_and_not_copied() -> None:
    torch.manual_seed(0)
    for norm in (OnePlus(16), torch.nn.LayerNorm(16)):
        assert plain_norm(norm)[0] is None
    with torch.no_grad():
        norm, x = OnePlus(16), torch.randn(9, 16)
        estimate = norm(x).norm(dim=-1)
        middle = float(estimate.median())
        decided = Chooser([Choice(3, 4, middle, slope=1.0)], 16, norm)(x)
    assert torch.equal(decided[0], estimate > middle)


def test_bfloat16_inputs_decide_as_their_numbers_do() -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(40, 24, generator=rng).bfloat16()
    estimate = x.float().norm(dim=-1).sort().values
    choice = Choice(3, 4, float(estimate[19:21].mean()), slope=1.0)
    assert int(Chooser([choice], 24)(x)[0].sum()) == 20
    assert Path(choosing._KERNEL).exists()
