"""Decisions between two bit-widths, from estimates and thresholds."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from millpond.ops import dispatch
from millpond.precision.calibration import Choice
from millpond.precision.selection import Chooser, plain_norm


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/ops` holds the two against each other; here each decides."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "kernels_enabled", False)


@pytest.mark.parametrize("normed", [False, True])
def test_each_linear_is_decided_by_its_own_estimate(normed: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(5, 70, generator=rng)
    norm = LlamaRMSNorm(70) if normed else None
    if norm is not None:
        norm.weight.data = torch.rand(70, generator=rng) + 0.5
    choices, decided = [], []
    for kind in (0, 8, 11):
        projection = torch.randn(kind, 70, generator=rng).bfloat16() if kind else None
        free = Choice(3, 4, slope=0.7, intercept=-0.2, projection=projection)
        estimates = free.estimate(x if norm is None else norm(x).detach())
        third, fourth = estimates.sort().values[2:4].tolist()
        choices.append(Choice(3, 4, (third + fourth) / 2, 0.7, -0.2, projection))
        decided.append(estimates > choices[-1].threshold)
    assert torch.equal(torch.stack([*Chooser(choices, 70, norm)(x)]), torch.stack(decided))


@pytest.mark.parametrize("limit", [float("inf"), float("-inf")])
def test_infinite_thresholds_decide_without_exception(limit: float) -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)) * 1e6
    choices = [Choice(3, 4, limit, slope=1.0), Choice(3, 4, limit, projection=torch.ones(8, 12).bfloat16())]
    assert bool((torch.stack([*Chooser(choices, 12)(x)]) == (limit < 0)).all())


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
