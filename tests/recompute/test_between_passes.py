"""What surrounds a step may change between the forward and the backward pass: put back, or refused."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from millpond import recompute
from millpond.recompute import RecomputeError

from .models import plain, weigh

LENGTH = 9
INPUTS, STATE = torch.randn(LENGTH, 4, 3), torch.randn(4, 3)


class Step(nn.Module):
    """Dropout, a buffer, a parameter that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop = nn.RNNCell(3, 3), nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("shift", torch.rand(3))

    def forward(self, x, h):
        h = self.cell(self.drop(x), h) * self.frozen + self.shift
        return h, h


def gradient(run, between, parameter):
    """The gradient of one parameter after running, changing something, and going backward."""
    torch.manual_seed(1)
    loss = weigh(run())
    between()
    loss.backward()
    return parameter.grad


@pytest.mark.parametrize(
    "change",
    [
        lambda step: step.eval(),
        lambda step: step.drop.eval(),
        lambda step: step.cell.requires_grad_(False),
        lambda step: step.cell.bias_hh.requires_grad_(False),
        lambda step: step.frozen.requires_grad_(),
    ],
    ids=["eval", "part in eval", "frozen", "one frozen", "unfrozen"],
)
def test_flags_are_put_back_for_the_backward_pass(change) -> None:
    ours, theirs = Step(), Step()
    theirs.load_state_dict(ours.state_dict())
    expected = gradient(
        lambda: torch.stack(plain(theirs, INPUTS, STATE)[0]), lambda: change(theirs), theirs.cell.weight_hh
    )
    found = gradient(lambda: recompute.bptt(ours, INPUTS, STATE, slots=2)[0], lambda: change(ours), ours.cell.weight_hh)
    torch.testing.assert_close(found, expected)
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).requires_grad == parameter.requires_grad
    assert [part.training for part in ours.modules()] == [part.training for part in theirs.modules()]


def test_autocast_around_the_backward_pass_alone() -> None:
    step = Step()
    expected = gradient(lambda: recompute.bptt(step, INPUTS, STATE, slots=2)[0], lambda: None, step.cell.weight_hh)
    step.cell.weight_hh.grad = None
    torch.manual_seed(1)
    loss = weigh(recompute.bptt(step, INPUTS, STATE, slots=2)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert torch.equal(step.cell.weight_hh.grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: step.frozen.data.copy_(step.frozen + 0.1), "returned something else"),
        (lambda step: step.frozen.add_(0.1), "parameter 'frozen' changed"),
        (lambda step: step.shift.mul_(1.0001), "buffer 'shift' changed"),
        (lambda step: setattr(step, "shift", step.shift + 1), "buffer 'shift' changed"),
        (lambda step: setattr(step.cell, "weight_hh", nn.Parameter(torch.eye(3))), "'cell.weight_hh' changed"),
    ],
    ids=["data", "parameter", "buffer", "another buffer", "another parameter"],
)
def test_tensors_of_a_module_that_change_in_between(change, message) -> None:
    step = Step()
    outputs, _ = recompute.bptt(step, INPUTS, STATE, slots=2)
    with torch.no_grad():
        change(step)
    with pytest.raises(RecomputeError, match=message):
        outputs.sum().backward()
    assert step.cell.bias_hh.grad is None


def test_parameters_swapped_in_for_one_call() -> None:
    """Outside the call the module has its own again, with which a step would run in the backward pass."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(3, 3)

        def forward(self, inputs):
            return recompute.bptt(self.cell, inputs, STATE, slots=2)[0]

    model = Model()
    other = {name: (2 * value.detach()).requires_grad_() for name, value in model.named_parameters()}
    outputs = torch.func.functional_call(model, other, (INPUTS,))
    with pytest.raises(RecomputeError, match="'weight_ih' changed"):
        outputs.sum().backward()


def noisy(draw):
    weight = torch.eye(3).requires_grad_()

    def step(x, h):
        h = torch.tanh(h @ weight + x + draw())
        return h.sum(), h

    return step, weight


SOURCES = {
    "torch.Generator": lambda: (lambda own: lambda: torch.rand(3, generator=own))(torch.Generator()),
    "numpy": lambda: (lambda own: lambda: float(own.random()))(np.random.default_rng(0)),
    "python": lambda: random.random,
    "a count of calls": lambda: (lambda calls: lambda: calls.append(0) or len(calls) / 99)([]),
    "a module out of reach": lambda: (lambda held: lambda: held[0](torch.ones(3)))([nn.Dropout(0.5)]),
}


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("source", list(SOURCES))
def test_a_step_that_does_something_else_the_second_time(source, slots) -> None:
    draw = SOURCES[source]()
    step, weight = noisy(draw)
    outputs, _ = recompute.bptt(step, INPUTS, STATE, slots=slots)
    if source == "a module out of reach":
        draw.__closure__[0].cell_contents[0].eval()
    with pytest.raises(RecomputeError, match="returned something else"):
        outputs.sum().backward()
    assert weight.grad is None


def test_a_loss_that_changes_its_mind() -> None:
    targets = [torch.zeros(4, 3)]
    total, _ = recompute.bptt(
        nn.RNNCell(3, 3), INPUTS, STATE, slots=2, loss=lambda h, t: (h - targets[0]).square().sum()
    )
    targets[0] = torch.ones(4, 3)
    with pytest.raises(RecomputeError, match="returned something else"):
        total.backward()


def test_with_every_step_kept_nothing_runs_again() -> None:
    own = torch.Generator()
    step, weight = noisy(lambda: torch.rand(3, generator=own))
    outputs, _ = recompute.bptt(step, INPUTS, STATE, slots=10_000)
    own.manual_seed(own.initial_seed())
    torch.rand(3, generator=own)  # measuring draws too
    (expected,) = torch.autograd.grad(torch.stack(plain(step, INPUTS, STATE)[0]).sum(), [weight])
    outputs.sum().backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, expected)
    with pytest.raises(RecomputeError, match="returned something else"):  # a second backward runs all of them again
        outputs.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_kernels_may_round_differently_without_a_graph(dtype) -> None:
    weight = torch.eye(3, dtype=dtype).requires_grad_()
    eps = torch.finfo(dtype).eps

    def step(x, h):
        h = torch.tanh(h @ weight + x)
        return h, h if torch.is_grad_enabled() else h * (1 + 4 * eps)

    outputs, _ = recompute.bptt(step, INPUTS.to(dtype), STATE.to(dtype), slots=2, strategy="hidden")
    outputs.abs().sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("rebound", [False, True])
def test_a_buffer_that_only_a_later_step_changes(rebound) -> None:
    class Averaging(Step):
        def forward(self, x, h):
            if x[0, 0] > 4:
                self.shift = self.shift + 1 if rebound else self.shift.add_(1)
            return super().forward(x, h)

    inputs = torch.arange(8.0)[:, None, None].expand(8, 4, 3)
    with pytest.raises(RecomputeError, match="a step changes the buffer 'shift'"):
        recompute.bptt(Averaging(), inputs, STATE, slots=10_000)


@pytest.mark.parametrize("hidden_in", ["attribute", "computed"])
def test_a_module_with_a_tensor_that_only_a_later_step_uses(hidden_in) -> None:
    class Late(Step):
        def __init__(self) -> None:
            super().__init__()
            leaf = torch.ones(3, requires_grad=True)
            self.hidden = [leaf if hidden_in == "attribute" else torch.exp(leaf)]

        def forward(self, x, h):
            _, h = super().forward(x, h)
            return h, h * self.hidden[0] if x[0, 0] > 4 else h

    inputs = torch.arange(8.0)[:, None, None].expand(8, 4, 3)
    with pytest.raises(RecomputeError, match="`parameters`"):
        recompute.bptt(Late(), inputs, STATE, slots=0)


def test_inside_torch_compile() -> None:
    cell, state = nn.LSTMCell(3, 5), (torch.zeros(4, 5), torch.zeros(4, 5))

    def loss(inputs, hidden, memory):
        outputs, _ = recompute.bptt(cell, inputs, (hidden, memory), slots=3)
        return outputs.square().sum() * 2

    (expected,) = torch.autograd.grad(loss(INPUTS, *state), [cell.weight_hh])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # Dynamo says so where it traces the planner
        (found,) = torch.autograd.grad(torch.compile(loss, backend="eager")(INPUTS, *state), [cell.weight_hh])
    assert torch.equal(found, expected)


def test_a_compiled_step() -> None:
    cell = nn.RNNCell(3, 3)

    def step(x, h):
        h = cell(x, h)
        return h, h

    expected = torch.autograd.grad(recompute.bptt(step, INPUTS, STATE, slots=3)[0].sum(), [cell.weight_hh])
    compiled = torch.compile(step, backend="eager")
    found = torch.autograd.grad(recompute.bptt(compiled, INPUTS, STATE, slots=3)[0].sum(), [cell.weight_hh])
    torch.testing.assert_close(found, expected)
