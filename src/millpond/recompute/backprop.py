"""`bptt`: a recurrent module over a sequence, with backpropagation inside an activation budget.

One autograd function stands for the whole sequence; its backward carries out the rest of a plan. Knows how the caller's
tensors enter and leave it; the plan, its execution and the measuring of a step are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from millpond.errors import RecomputeError
from millpond.recompute.ambient import Generators
from millpond.recompute.executor import Executor
from millpond.recompute.plans import Strategy, plan
from millpond.recompute.probe import Cell, probe
from millpond.recompute.sequence import Collector, Inputs, flatten, unflatten


@torch.compiler.disable  # type: ignore[untyped-decorator]
def bptt(
    step: Callable[..., Any],
    inputs: Any,
    state: Any,
    *,
    budget: str | int | None = None,
    slots: int | None = None,
    strategy: Strategy = "auto",
    loss: Callable[[Any, int], Tensor] | None = None,
    parameters: Iterable[Tensor] = (),
) -> tuple[Any, Any]:
    """Run `step` over a sequence; backpropagating through the result stays inside an activation budget.

    Gradients are those of plain backpropagation through time. After Gruslys et al., "Memory-Efficient Backpropagation
    Through Time" (NIPS 2016).

    Args:
        step: `step(x, state) -> (output, state)`; or an nn.LSTMCell, GRUCell or RNNCell as it is. The state must keep
            its shapes. It runs several times for the same x, so it must not count, log or change buffers, and must depend
            on its arguments, its modules and torch's default random generators only. Inside torch.compile it runs eagerly,
            unless it is compiled itself.
        inputs: a pytree of tensors [T, ...], or a list with one pytree per step.
        state: the initial state, a pytree.
        budget: the most bytes of stored activations between and during forward and backward, as a number or for example
            "64MiB". Parameters, inputs, outputs and gradients are not counted. Or:
        slots: stored states beside the initial one and the step at work (see `millpond.recompute.plan`).
        strategy: "auto", "mixed", "hidden" or "internal".
        loss: `loss(output, t) -> scalar`, t from 0, summed over the steps, so that outputs need not be kept.
        parameters: tensors needing gradients that the step uses, where the first step does not show them all or
            something else computed them. Modules' parameters and leaves that the first step uses are found.

    Returns:
        (outputs, final state). Outputs are stacked tensors [T, ...], or a list if `inputs` is one, or the sum of the
        losses if `loss` is given. Both are copies of what the steps returned.

    Raises:
        BudgetError: the budget is below one step; names the minimum that works.
        RecomputeError: the step cannot be recomputed; the message names the cause.
    """
    _refuse_transforms()
    cell, sequence = Cell(step, loss), Inputs(inputs)
    _refuse_layout(step, sequence, state)
    collector = Collector(sequence.length, "sum" if loss is not None else "stack" if sequence.stacked else "list")
    explicit = tuple(tensor for tensor in parameters if tensor.requires_grad)
    if not torch.is_grad_enabled():
        return _plain(cell, sequence, state, collector)
    largest = sequence.largest()
    leaves, spec = sequence.at(largest)
    with _time_first(sequence, state):
        seen = probe(cell, unflatten(leaves, spec), state, largest, explicit)
    own = {id(leaf): leaf for module in cell.modules() for leaf in module.parameters() if leaf.requires_grad}
    found = {id(leaf): leaf for leaf in (*explicit, *own.values(), *seen.parameters)}
    _refuse_hooks(found.values())
    _refuse_nested(tuple(found.values()))
    state_leaves, state_spec = flatten(state)
    tensors = [*state_leaves, *sequence.leaves, *found.values()]
    _refuse_tangents(tensors)
    if not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        return _plain(cell, sequence, state, collector)
    planned = plan(
        length=sequence.length,
        hidden_bytes=seen.size.hidden_bytes,
        internal_bytes=seen.size.internal_bytes,
        budget=budget,
        slots=slots,
        strategy=strategy,
    )
    executor = Executor(cell, sequence, state, planned, tuple(found.values()), Generators(tensors), seen.random)
    results = _Bptt.apply(executor, collector, *tensors)
    count = len(results) - len(state_leaves)
    return collector.finish(list(results[:count])), unflatten(list(results[count:]), state_spec)


class _Bptt(torch.autograd.Function):
    """Inputs: the leaves of the initial state, of the inputs, and the parameters. Outputs: leaves of outputs and state."""

    @staticmethod
    def forward(ctx: Any, executor: Executor, collector: Collector, *tensors: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        final, _ = flatten(executor.forward(collector))
        outputs = collector.take()
        ctx.executor, ctx.collector = executor, collector
        ctx.outputs = len(outputs)
        # Saved for their version counters: a parameter changed before backward must be an error, as in plain autograd.
        ctx.save_for_backward(*(tensor for tensor in tensors if isinstance(tensor, Tensor)))
        results = (*outputs, *final)
        ctx.mark_non_differentiable(
            *(t for t in results if isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex()))
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_transforms(*grads)
        _ = ctx.saved_tensors  # raises if freed, or changed in place
        executor: Executor = ctx.executor
        initial, inputs, parameters = executor.backward(
            list(grads[: ctx.outputs]), ctx.collector, list(grads[ctx.outputs :]), list(ctx.needs_input_grad[2:])
        )
        return (None, None, *initial, *inputs, *parameters)


def _plain(cell: Cell, sequence: Inputs, state: Any, collector: Collector) -> tuple[Any, Any]:
    """The loop itself, where nothing needs gradients."""
    with torch.no_grad(), _time_first(sequence, state):
        for step in range(1, sequence.length + 1):
            leaves, spec = sequence.at(step)
            output, state = cell(unflatten(leaves, spec), state, step)
            collector.put(step, output)
    return collector.finish(list(collector.take())), state


def _refuse_transforms(*grads: Tensor | None) -> None:
    """Refuse torch.func's transforms and batches of gradients, which would run a whole plan on wrapped tensors."""
    batched = any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    if batched or torch._C._are_functorch_transforms_active():
        raise RecomputeError(
            "bptt does not work inside torch.func transforms (grad, vjp, jvp, vmap) or gradients in batches "
            "(is_grads_batched, vectorize): use torch.autograd.grad, and a batch dimension in the state"
        )


def _refuse_tangents(tensors: Iterable[Any]) -> None:
    """Refuse forward-mode differentiation."""
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RecomputeError("bptt has no forward-mode derivative: use reverse mode (torch.autograd.grad)")


def _refuse_layout(step: Callable[..., Any], sequence: Inputs, state: Any) -> None:
    """Refuse a missing state, and an nn.LSTM, GRU or RNN that would take a batch for a stretch of time."""
    if state is None:
        raise RecomputeError(
            "the initial state is None: give it as tensors, for example zeros [B, H] (a pair of them for an LSTM)"
        )
    if isinstance(step, nn.RNNBase):
        x, hidden = _first_tensor(sequence.at(1)[0]), _first_tensor(state)
        if x is not None and hidden is not None and x.dim() != hidden.dim():
            name = type(step).__name__
            raise RecomputeError(
                f"nn.{name} runs a stretch of time in one step, so inputs must be stretches, [T, steps, B, D], and not "
                f"{list(sequence.leaves[0].shape)}: for single steps, [T, B, D], give an nn.{name}Cell"
            )


@contextmanager
def _time_first(sequence: Inputs, state: Any) -> Iterator[None]:
    """Say so where a step fails because the inputs have the batch first."""
    try:
        yield
    except RuntimeError as error:
        first, hidden = _first_tensor(sequence.leaves), _first_tensor(state)
        if sequence.stacked and first is not None and first.dim() > 2 and hidden is not None and hidden.dim():
            length, batch = first.shape[:2]
            if batch != hidden.shape[0] == length:
                raise RecomputeError(
                    f"inputs {list(first.shape)} seem to have the batch first, as the state {list(hidden.shape)} has, but "
                    f"time must come first, [T, B, ...]: use inputs.transpose(0, 1) (the step said: {error})"
                ) from error
        raise


def _first_tensor(tree: Any) -> Tensor | None:
    return next((leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)), None)


def _refuse_hooks(parameters: Iterable[Tensor]) -> None:
    """Refuse hooks that change a gradient: they would run on every step's share rather than on the sum."""
    for tensor in parameters:
        if tensor._backward_hooks:
            raise RecomputeError(
                f"a parameter of shape {tuple(tensor.shape)} has a gradient hook, which would run at every step: "
                "remove it and use register_post_accumulate_grad_hook, or change the gradient before the optimiser's step"
            )


def _refuse_nested(parameters: tuple[Tensor, ...]) -> None:
    """Refuse parameters of which one was computed from another: its gradient would be counted twice."""
    nodes = {tensor.grad_fn: tensor for tensor in parameters if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in parameters}
    for start in nodes:
        todo, visited = [start], set()
        while todo:
            node = todo.pop()
            for following, _ in node.next_functions:
                if following is None or following in visited:
                    continue
                visited.add(following)
                variable = getattr(following, "variable", None)
                if following in nodes or (variable is not None and id(variable) in leaves):
                    raise RecomputeError(
                        "one of `parameters` was computed from another, so its gradient would be counted twice: "
                        "pass the computed tensor in the inputs or in the state"
                    )
                todo.append(following)
