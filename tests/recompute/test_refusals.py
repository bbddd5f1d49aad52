"""What cannot work is refused, with the cause."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from millpond import recompute
from millpond.errors import BudgetError, MillpondError
from millpond.recompute import RecomputeError

from .models import Stack

INPUTS, STATE = torch.randn(9, 4, 3), torch.zeros(4, 3)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), norm

    def forward(self, x, h):
        h = torch.tanh(self.norm(self.linear(h + x)))
        return h, h


@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_norm(wrapped) -> None:
    step = Normed(nn.BatchNorm1d(3))
    holder = [step]  # out of reach of a look into the closure, but not of a look at the graph
    call = (lambda x, h: holder[0](x, h)) if wrapped else step
    with pytest.raises(RecomputeError, match="running statistics"):
        recompute.bptt(call, INPUTS, STATE, slots=3)
    step.eval()
    outputs, _ = recompute.bptt(call, INPUTS, STATE, slots=3)
    outputs.sum().backward()
    assert step.linear.weight.grad is not None


def test_batch_norm_without_running_statistics_works() -> None:
    recompute.bptt(Normed(nn.BatchNorm1d(3, track_running_stats=False)), INPUTS, STATE, slots=3)


def test_a_buffer_that_changes() -> None:
    class Counter(Normed):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, h):
            self.calls += 1
            return super().forward(x, h)

    with pytest.raises(RecomputeError, match="'calls'"):
        recompute.bptt(Counter(), INPUTS, STATE, slots=3)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_state_that_grows(at_once) -> None:
    def step(x, cache):
        if at_once or x.mean() == 5:
            cache = torch.cat([cache, x])
        return cache.sum(), cache

    inputs = torch.arange(8.0)[:, None, None].repeat(1, 1, 2).requires_grad_()
    with pytest.raises(RecomputeError, match=r"step \d changes the shapes .* grows"):
        recompute.bptt(step, inputs, torch.zeros(1, 2), slots=3)


def test_a_list_that_grows() -> None:
    with pytest.raises(RecomputeError, match="structure"):
        recompute.bptt(lambda x, past: (x, [*past, x]), INPUTS.requires_grad_(), [torch.zeros(4, 3)], slots=3)


def test_a_state_whose_type_widens_later() -> None:
    def step(x, h):
        h = torch.tanh(h + x.to(h.dtype))
        return h, h.double() if x.mean() > 4 else h

    inputs = torch.arange(8.0)[:, None].requires_grad_()
    with pytest.raises(RecomputeError, match="step 6 takes 8 bytes"):
        recompute.bptt(step, inputs, torch.zeros(1), slots=3)


def test_a_state_changed_in_place() -> None:
    cell = nn.Linear(3, 3)

    def step(x, h):
        new = torch.tanh(cell(h) + x)
        with torch.no_grad():
            h.mul_(0.5)
        return new, new

    outputs, _ = recompute.bptt(step, INPUTS, STATE.clone(), slots=2, strategy="hidden")
    with pytest.raises((RecomputeError, RuntimeError), match="place"):
        outputs.sum().backward()


def test_a_parameter_changed_before_backward() -> None:
    cell = nn.RNNCell(3, 3)
    outputs, _ = recompute.bptt(cell, INPUTS, STATE, slots=2)
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        outputs.sum().backward()


def test_a_step_that_starts_to_draw_numbers_later() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(x, h):
        h = torch.tanh(h * weight + (torch.rand(3) if x.item() == 4 else x))
        return h, h

    with pytest.raises(RecomputeError, match="random numbers"):
        recompute.bptt(step, torch.arange(8.0), torch.zeros(3), slots=3)


def test_a_budget_below_one_step_names_the_least() -> None:
    stack = Stack()
    inputs, state = torch.randn(9, 2, 4), stack.start()
    with pytest.raises(BudgetError, match="minimum that works") as caught:
        recompute.bptt(stack, inputs, state, budget=100)
    assert caught.value.minimum == recompute.measure(stack, inputs[0], state).internal_bytes
    outputs, _ = recompute.bptt(stack, inputs, state, budget=caught.value.minimum)
    outputs["logits"].sum().backward()


def test_parameters_computed_from_each_other() -> None:
    source = torch.ones(3, requires_grad=True)
    derived = torch.tanh(source)

    def step(x, h):
        h = torch.tanh(h * source + derived + x.mean())
        return h, h

    with pytest.raises(RecomputeError, match="counted twice"):
        recompute.bptt(step, INPUTS, torch.zeros(3), slots=3, parameters=[derived])


@pytest.mark.parametrize(
    ("step", "inputs", "state", "message"),
    [
        (nn.RNNCell(3, 3), [], STATE, "empty"),
        (nn.RNNCell(3, 3), (INPUTS, torch.zeros(2, 3)), STATE, "one length"),
        (nn.RNNCell(3, 3), {"x": 3}, STATE, "first dimension"),
        (nn.Linear(3, 3), INPUTS, STATE, "argument"),
        (lambda x, h: h * x, INPUTS, STATE, r"\(output, state\)"),
        (lambda x, h: (x, h), INPUTS, (), "no tensor"),
        (nn.LSTM(3, 3), INPUTS, None, "initial state is None"),
        (nn.LSTM(3, 3), INPUTS, (torch.zeros(1, 4, 3),) * 2, "give an nn.LSTMCell"),
        (nn.RNNCell(3, 3), INPUTS.transpose(0, 1), STATE, r"time must come first, .*transpose\(0, 1\)"),
        (lambda x, h: ("text", h * x), torch.ones(9, 4, 3, requires_grad=True), STATE, "consist of tensors"),
    ],
)
def test_bad_calls(step, inputs, state, message) -> None:
    with pytest.raises((MillpondError, TypeError), match=message):
        recompute.bptt(step, inputs, state, slots=3)


def test_the_batch_first_without_gradients() -> None:
    with torch.no_grad(), pytest.raises(RecomputeError, match="time must come first"):
        recompute.bptt(nn.RNNCell(3, 3), INPUTS.transpose(0, 1), STATE, slots=3)


def test_an_error_of_the_step_itself_passes_through() -> None:
    def step(x, h):
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        recompute.bptt(step, INPUTS, STATE, slots=3)


CELL = nn.RNNCell(3, 3)


def total(inputs):
    return recompute.bptt(CELL, inputs, STATE, slots=3)[0].sum()


def in_forward_mode(inputs):
    with forward_ad.dual_level():
        total(forward_ad.make_dual(inputs, inputs))


@pytest.mark.parametrize(
    ("transformed", "message"),
    [
        (torch.func.grad(total), "torch.func"),
        (lambda inputs: torch.vmap(total)(inputs[None]), "torch.func"),
        (in_forward_mode, "reverse mode"),
    ],
    ids=["grad", "vmap", "forward_ad"],
)
def test_transforms(transformed, message) -> None:
    with pytest.raises(RecomputeError, match=message):
        transformed(INPUTS)


def test_a_batch_of_gradients() -> None:
    inputs = INPUTS.clone().requires_grad_()
    outputs, _ = recompute.bptt(nn.RNNCell(3, 3), inputs, STATE, slots=3)
    with pytest.raises(RecomputeError, match="is_grads_batched"):
        torch.autograd.grad(outputs, inputs, torch.ones(2, *outputs.shape), is_grads_batched=True)


def test_outputs_of_different_shapes_need_a_list() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(x, h):
        h = torch.tanh(h * weight + x)
        return h[: 1 + int(x) % 2], h

    with pytest.raises(RecomputeError, match="list"):
        recompute.bptt(step, torch.arange(4.0), torch.zeros(3), slots=3)
    outputs, _ = recompute.bptt(step, list(torch.arange(4.0)), torch.zeros(3), slots=3)
    assert [len(output) for output in outputs] == [1, 2, 1, 2]


def test_a_loss_must_be_a_scalar() -> None:
    with pytest.raises(RecomputeError, match="scalar"):
        recompute.bptt(nn.RNNCell(3, 3), INPUTS, STATE, slots=3, loss=lambda output, t: output)


def test_a_gradient_hook_on_a_parameter() -> None:
    cell = nn.RNNCell(3, 3)
    handle = cell.weight_hh.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    with pytest.raises(RecomputeError, match="hook"):
        recompute.bptt(cell, INPUTS, STATE, slots=3)
    handle.remove()
    calls = []
    cell.weight_hh.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.grad.clone()))
    outputs, _ = recompute.bptt(cell, INPUTS, STATE, slots=3)
    outputs.sum().backward()
    assert len(calls) == 1
