"""Gradients, outputs and forward counts of `bptt` against the plain loop."""

import functools

import pytest
import torch
from torch import nn

from millpond import recompute
from millpond.recompute.sequence import flatten, unflatten

from .models import Chunk, Stack, leaves_needing_grad, plain, weigh

LENGTH = 17
PLANS = [
    {"slots": 0},
    {"slots": 3, "strategy": "hidden"},
    {"slots": 3, "strategy": "internal"},
    {"slots": 9, "strategy": "mixed"},
    {"slots": 9},
    {"slots": 10_000},
    {"budget": "1MB"},
]


class Counting(nn.Module):
    """A step that counts its runs (in a plain attribute, so that recomputation cannot see it)."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step, self.runs = step, 0

    def forward(self, x, state):
        self.runs += 1
        result = self.step(x, state)
        return (result[0] if isinstance(result, tuple) else result, result)


def both(step, inputs, state, parameters, **how):
    """Gradients of plain and of planned backpropagation, for all of inputs, state and parameters."""
    wanted = [*leaves_needing_grad(inputs, state), *parameters]
    outputs, final = plain(step, inputs, state)
    expected = torch.autograd.grad(weigh([outputs, final]), wanted, allow_unused=True)
    planned, end = recompute.bptt(step, inputs, state, **how)
    if not isinstance(inputs, list):
        planned = unstack(planned)
    for a, b in zip(flatten([planned, end])[0], flatten([outputs, final])[0], strict=True):
        assert torch.equal(a, b)
    return torch.autograd.grad(weigh([planned, end]), wanted, allow_unused=True), expected


def unstack(outputs):
    leaves, spec = flatten(outputs)
    return [unflatten(list(step), spec) for step in zip(*leaves, strict=True)]


@pytest.mark.parametrize("how", PLANS, ids=str)
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_torch_cells(kind, how) -> None:
    torch.manual_seed(0)
    cell = kind(3, 5)
    state = torch.randn(2, 5)
    if kind is nn.LSTMCell:
        state = (state, torch.randn(2, 5))
    ours, theirs = both(cell, torch.randn(LENGTH, 2, 3), state, list(cell.parameters()), **how)
    for a, b in zip(ours, theirs, strict=True):
        if kind is nn.GRUCell:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", PLANS, ids=str)
def test_a_stack_with_nested_states_and_outputs(how) -> None:
    torch.manual_seed(0)
    stack = Stack()
    ours, theirs = both(stack, torch.randn(LENGTH, 2, 4), stack.start(), list(stack.parameters()), **how)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", PLANS, ids=str)
def test_chunks_of_different_sizes_in_a_list(how) -> None:
    torch.manual_seed(0)
    block = Chunk()
    inputs = [torch.randn(2, 64, 8) for _ in range(9)] + [torch.randn(2, 23, 8)]
    ours, theirs = both(block, inputs, torch.zeros(2, 8, 8), list(block.parameters()), **how)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strategy", ["hidden", "internal", "mixed"])
@pytest.mark.parametrize("slots", [0, 1, 4, 11, 500])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_forward_counts_are_the_tables_and_one_for_measuring(length, slots, strategy) -> None:
    """The right-spine states are stored during the forward pass, so that it is the first part of the plan."""
    step = Counting(nn.RNNCell(2, 3))
    inputs, state = torch.randn(length, 1, 2), torch.zeros(1, 3)
    outputs, _ = recompute.bptt(step, inputs, state, slots=slots, strategy=strategy)
    assert step.runs == length + 1
    outputs.sum().backward()
    size = recompute.measure(step.step, inputs[0], state)
    expected = recompute.plan(
        length=length,
        slots=slots,
        strategy=strategy,
        hidden_bytes=size.hidden_bytes,
        internal_bytes=size.internal_bytes,
    )
    assert step.runs == expected.forwards + 1


def test_dropout_draws_the_same_numbers_again() -> None:
    stack, inputs = Stack(dropout=0.4), torch.randn(LENGTH, 2, 4)
    state = stack.start()
    torch.manual_seed(7)
    outputs, _ = plain(stack, inputs, state)
    after = torch.get_rng_state()
    expected = torch.autograd.grad(weigh(outputs), list(stack.parameters()))
    for how in PLANS:
        torch.manual_seed(7)
        planned, _ = recompute.bptt(stack, inputs, state, **how)
        assert torch.equal(torch.get_rng_state(), after), "the forward pass draws what the plain loop draws"
        torch.rand(5)
        between = torch.get_rng_state()
        ours = torch.autograd.grad(weigh(unstack(planned)), list(stack.parameters()))
        assert torch.equal(torch.get_rng_state(), between), "backward leaves the generator alone"
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", PLANS, ids=str)
def test_autocast(how) -> None:
    torch.manual_seed(0)
    stack, inputs = Stack(width=16), torch.randn(LENGTH, 2, 4)
    state = stack.start()
    wanted = list(stack.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = plain(stack, inputs, state)
    expected = torch.autograd.grad(weigh(outputs), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        planned, _ = recompute.bptt(stack, inputs, state, **how)
    assert planned["logits"].dtype == torch.bfloat16
    assert torch.equal(planned["logits"], torch.stack([output["logits"] for output in outputs]))
    ours = torch.autograd.grad(weigh(unstack(planned)), wanted)
    for a, b in zip(ours, expected, strict=True):
        # The plain loop sums a weight's gradients in bfloat16, we in float32.
        assert torch.linalg.vector_norm(a - b) < 0.02 * torch.linalg.vector_norm(b)


def test_a_closure_finds_its_parameters_and_constants() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 3, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    shift = torch.randn(3)

    def step(x, h):
        h = torch.tanh(h @ weight * scale + x + shift)
        return h.sum(-1), h

    ours, theirs = both(step, torch.randn(LENGTH, 2, 3), torch.randn(2, 3), [weight, scale], slots=4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_computed_outside_is_named_or_passed() -> None:
    torch.manual_seed(0)
    source = torch.randn(3, 3, requires_grad=True)
    weight = torch.tanh(source)

    def step(x, h):
        h = torch.tanh(h @ weight + x)
        return h, h

    inputs, state = torch.randn(LENGTH, 2, 3), torch.zeros(2, 3)
    with pytest.raises(recompute.RecomputeError, match="TanhBackward0"):
        recompute.bptt(step, inputs, state, slots=4)
    outputs, _ = recompute.bptt(step, inputs, state, slots=4, parameters=[weight])
    (ours,) = torch.autograd.grad(weigh(outputs), [source], retain_graph=True)
    expected, _ = plain(step, inputs, state)
    (theirs,) = torch.autograd.grad(weigh(torch.stack(expected)), [source])
    torch.testing.assert_close(ours, theirs)


def test_a_parameter_that_the_first_step_does_not_show() -> None:
    early, late = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)

    def step(x, h):
        h = torch.tanh(h * (late if x.item() == 4 else early))
        return h, h

    inputs, state = torch.arange(8), torch.ones(3)
    outputs, _ = recompute.bptt(step, inputs, state, slots=0)
    with pytest.raises(recompute.RecomputeError, match=r"step 5 .*`parameters`"):
        outputs.sum().backward()
    outputs, _ = recompute.bptt(step, inputs, state, slots=2, parameters=[early, late])
    ours = torch.autograd.grad(outputs.sum(), [early, late])
    expected = torch.autograd.grad(torch.stack(plain(step, inputs, state)[0]).sum(), [early, late])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_learned_initial_state_that_the_step_uses_too() -> None:
    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(2, 3))

        def forward(self, x, h):
            h = torch.tanh(0.5 * h + x * self.start)
            return h, h

    step, inputs = Anchored(), torch.randn(LENGTH, 2, 3)
    outputs, _ = recompute.bptt(step, inputs, step.start, slots=3)
    (ours,) = torch.autograd.grad(weigh(outputs), [step.start])
    expected, _ = plain(step, inputs, step.start)
    (theirs,) = torch.autograd.grad(weigh(torch.stack(expected)), [step.start])
    torch.testing.assert_close(ours, theirs)


def test_a_loss_per_step_needs_no_outputs() -> None:
    torch.manual_seed(0)
    cell, head = nn.GRUCell(3, 5), nn.Linear(5, 4)
    inputs, state, targets = torch.randn(LENGTH, 2, 3), torch.zeros(2, 5), torch.randint(4, (LENGTH, 2))
    wanted = [*leaves_needing_grad(inputs, state), *cell.parameters(), *head.parameters()]

    def loss(output, t):
        return nn.functional.cross_entropy(head(output), targets[t])

    outputs, _ = plain(cell, inputs, state)
    expected = sum(loss(output, t) for t, output in enumerate(outputs))
    total, final = recompute.bptt(cell, inputs, state, slots=6, loss=loss)
    torch.testing.assert_close(total, expected)
    assert torch.equal(final, outputs[-1])
    ours, theirs = torch.autograd.grad(total, wanted), torch.autograd.grad(expected, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice_and_for_chosen_inputs() -> None:
    cell, inputs = nn.LSTMCell(3, 5), torch.randn(LENGTH, 2, 3, requires_grad=True)
    state = (torch.randn(2, 5, requires_grad=True), torch.randn(2, 5))
    outputs, _ = recompute.bptt(cell, inputs, state, slots=5)
    loss = weigh(outputs)
    first = torch.autograd.grad(loss, [inputs, state[0], *cell.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [inputs, state[0], *cell.parameters()], retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    loss.backward(inputs=[state[0]], retain_graph=True)
    assert torch.equal(state[0].grad, first[1])
    assert inputs.grad is None
    assert all(parameter.grad is None for parameter in cell.parameters())
    loss.backward()
    assert torch.equal(inputs.grad, first[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_second_derivative() -> None:
    cell, inputs = nn.RNNCell(3, 5), torch.randn(LENGTH, 2, 3, requires_grad=True)
    outputs, _ = recompute.bptt(cell, inputs, torch.zeros(2, 5), slots=5)
    (grad,) = torch.autograd.grad(outputs.pow(2).sum(), [inputs], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("slots", [0, 3, 500])
def test_what_needs_no_gradient_gets_none(slots) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.unused = nn.LSTMCell(3, 5), nn.Linear(2, 2)
            self.cell.weight_ih.requires_grad_(False)

        def forward(self, x, state):
            state = self.cell(x["x"].float(), state)
            return state[0], state

    step, inputs, state = Idle(), {"x": torch.randint(5, (LENGTH, 2, 3))}, (torch.zeros(2, 5), torch.zeros(2, 5))
    outputs, _ = recompute.bptt(step, inputs, state, slots=slots)
    # Only a middle output has a say, so the last steps get no gradient at all.
    outputs[LENGTH // 2].sum().backward()
    assert step.unused.weight.grad is None
    assert step.cell.weight_ih.grad is None
    ours = step.cell.weight_hh.grad
    expected, _ = plain(step, [{"x": x} for x in inputs["x"]], state)
    (theirs,) = torch.autograd.grad(expected[LENGTH // 2].sum(), [step.cell.weight_hh])
    assert torch.equal(ours, theirs)


def test_without_grad_it_is_the_plain_loop() -> None:
    step = Counting(nn.GRUCell(3, 5))
    with torch.no_grad():
        outputs, state = recompute.bptt(step, torch.randn(LENGTH, 2, 3), torch.zeros(2, 5), slots=3)
    assert step.runs == LENGTH
    assert not outputs.requires_grad
    assert torch.equal(outputs[-1], state)


def test_different_lengths_and_integers_in_the_state() -> None:
    """A bound method; a counter tensor and a plain number ride along in the state."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def one(self, gain, x, state):
            h, clock, name = state
            h = torch.tanh(h @ self.weight * gain + x + clock)
            return h, (h, clock + 1, name)

    cell = Cell()
    step = functools.partial(cell.one, 0.5)
    for length in (1, 2, 7, 40, 13):
        inputs = torch.randn(length, 2, 3)
        state = (torch.zeros(2, 3), torch.tensor(0), 5)
        outputs, final = recompute.bptt(step, inputs, state, slots=5)
        assert final[1:] == (torch.tensor(length), 5)
        expected, _ = plain(step, inputs, state)
        (ours,) = torch.autograd.grad(weigh(outputs), [cell.weight])
        (theirs,) = torch.autograd.grad(weigh(torch.stack(expected)), [cell.weight])
        torch.testing.assert_close(ours, theirs)


def test_outputs_are_the_callers_own() -> None:
    """Writing into what came back must not reach a stored state."""
    cell, inputs, state = nn.RNNCell(3, 5), torch.randn(LENGTH, 2, 3), torch.zeros(2, 5)
    outputs, final = recompute.bptt(cell, inputs, state, slots=400)
    reference, _ = recompute.bptt(cell, inputs, state, slots=0)
    loss = outputs.sum()
    with torch.no_grad():
        outputs.zero_()
        final.zero_()
    loss.backward()
    expected = torch.autograd.grad(reference.sum(), list(cell.parameters()))
    for parameter, theirs in zip(cell.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, theirs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", PLANS, ids=str)
def test_cuda_with_dropout_and_autocast(how) -> None:
    stack = Stack(width=16, dropout=0.3).cuda()
    inputs = torch.randn(LENGTH, 2, 4, device="cuda")
    state = {name: tuple(part.cuda() for part in pair) for name, pair in stack.start().items()}
    wanted = list(stack.parameters())
    torch.manual_seed(3)
    with torch.autocast("cuda", torch.bfloat16):
        outputs, _ = plain(stack, inputs, state)
    expected = torch.autograd.grad(sum(output["logits"].float().sum() for output in outputs), wanted, allow_unused=True)
    torch.manual_seed(3)
    with torch.autocast("cuda", torch.bfloat16):
        planned, _ = recompute.bptt(stack, inputs, state, **how)
    ours = torch.autograd.grad(planned["logits"].float().sum(), wanted, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) < 0.03 * torch.linalg.vector_norm(b)
