"""The ways to backpropagate through time that bench/recompute.py compares, on one task."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from millpond import recompute

__all__ = ["Task", "package_schedules", "run_forward", "run_plain", "run_planned", "run_schedule", "run_sqrt"]


@dataclass(frozen=True)
class Task:
    """One LSTM cell and one sequence; `loss(h)` is taken at every step."""

    cell: nn.LSTMCell
    inputs: Tensor
    state: tuple[Tensor, Tensor]

    @property
    def length(self) -> int:
        return len(self.inputs)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = self.cell(x, state)
        return state[0].square().mean(), state


def run_plain(task: Task) -> None:
    state, total = task.state, torch.zeros(())
    for x in task.inputs:
        loss, state = task.step(x, state)
        total = total + loss
    total.backward()


def run_sqrt(task: Task) -> None:
    """Chen et al.: the states every sqrt(T) steps; the last stretch is kept, as it is needed first."""
    size = round(math.sqrt(task.length))

    def stretch(xs: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        total, now = torch.zeros(()), state
        for x in xs:
            loss, now = task.step(x, now)
            total = total + loss
        return (total, *now)

    state, total = task.state, torch.zeros(())
    for start in range(0, task.length, size):
        xs = task.inputs[start : start + size]
        if start + size < task.length:
            loss, *state = checkpoint(stretch, xs, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, *state = stretch(xs, *state)
        total = total + loss
    total.backward()


def run_planned(task: Task, budget: int, strategy: str) -> None:
    total, _ = recompute.bptt(task.step, task.inputs, task.state, budget=budget, strategy=strategy, loss=first)
    total.backward()


def first(output: Tensor, t: int) -> Tensor:
    """The step's output is its loss already."""
    return output


def run_schedule(task: Task, actions: list[Any]) -> None:
    """A plain executor for the schedules of the checkpoint_schedules package."""
    from checkpoint_schedules import Copy, Forward, Move, Reverse, StorageType

    states: dict[int, tuple[Tensor, Tensor]] = {}
    graphs: dict[int, tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]] = {}
    now, carry = task.state, [torch.zeros_like(part) for part in task.state]
    parameters = list(task.cell.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for action in actions:
        if isinstance(action, Forward):
            if action.write_ics:
                states[action.n0] = now
            for n in range(action.n0, action.n1):
                if action.write_adj_deps:
                    start = tuple(part.detach().requires_grad_() for part in now)
                    loss, end = task.step(task.inputs[n], start)
                    graphs[n] = (start, loss, end)
                    now = tuple(part.detach() for part in end)
                else:
                    with torch.no_grad():
                        _, now = task.step(task.inputs[n], now)
        elif isinstance(action, (Copy, Move)):
            if action.n in states:
                now = states[action.n]
                if isinstance(action, Move):
                    del states[action.n]
            else:
                # An internal state comes from storage to work: nothing to do, its graph is backpropagated next.
                assert action.to_storage == StorageType.WORK
        elif isinstance(action, Reverse):
            for n in reversed(range(action.n0, action.n1)):
                start, loss, end = graphs.pop(n)
                grads = torch.autograd.grad([loss, *end], [*start, *parameters], [torch.ones(()), *carry])
                carry = list(grads[:2])
                for held, grad in zip(sums, grads[2:], strict=True):
                    held.add_(grad)
                del start, loss, end
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad


def run_forward(task: Task) -> None:
    """All steps once, without a graph."""
    with torch.no_grad():
        state = task.state
        for x in task.inputs:
            _, state = task.step(x, state)


def package_schedules(task: Task, size: recompute.StepSize, full: int) -> dict[str, dict[str, Any]]:
    """Schedules of the package for a budget; it counts the initial state among its snapshots, we do not."""
    from checkpoint_schedules import MixedCheckpointSchedule, Revolve, StorageType

    made = {}
    cases = [
        ("checkpoint_schedules Revolve, 1%", 0.01, size.hidden_bytes, lambda n: Revolve(task.length, n)),
        # Its mixed schedule takes both kinds of state to be of one size, so a unit has to hold the larger.
        (
            "checkpoint_schedules Mixed, 2%",
            0.02,
            size.internal_bytes,
            lambda n: MixedCheckpointSchedule(task.length, n, storage=StorageType.RAM),
        ),
    ]
    for name, share, unit, schedule in cases:
        snapshots = (int(share * full) - size.internal_bytes) // unit + 1
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actions = list(schedule(snapshots))
        seconds = time.perf_counter() - start
        forwards = sum(action.n1 - action.n0 for action in actions if type(action).__name__ == "Forward")
        made[name] = {"actions": actions, "share": share, "forwards": forwards, "planning_seconds": round(seconds, 3)}
    return made
