"""Carries out a plan on real tensors: runs steps, keeps states and graphs, backpropagates, lets go.

The forward pass is the plan's part before its first backward. Knows tensors and graphs; nothing about how a plan is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from millpond.errors import RecomputeError
from millpond.recompute.ambient import Autocast, Flags, Generators, ModuleTensors, RngState
from millpond.recompute.fingerprint import Fingerprints
from millpond.recompute.plans import Plan
from millpond.recompute.probe import Cell, check_state, graph_parameters, leaf_of, node_number
from millpond.recompute.schedule import Action, Op
from millpond.recompute.sequence import (
    Collector,
    InputGrads,
    Inputs,
    copy_state,
    flatten,
    map_tensors,
    tensor_bytes,
    unflatten,
)


@dataclass(frozen=True)
class _Held:
    """A state to go on from. `versions` tell whether somebody has written into it since."""

    state: Any
    versions: list[int]
    rng: RngState | None


@dataclass(frozen=True)
class _Graph:
    """The graph of one step, and the state behind it.

    Outputs and the state behind are held as edges of the graph, where gradients enter, not as tensors: outputs take no
    memory unless autograd saved them.
    """

    state_leaves: list[Any]
    input_leaves: list[Any]
    edges: list[GradientEdge | None]
    behind: _Held


class Executor:
    """One sequence at work.

    Args:
        cell, inputs, state: what runs, on what, from where. `state` is the caller's initial state.
        plan: the schedule; `plan.hidden_bytes` is also the most that a stored state may take.
        parameters: tensors whose gradients are gathered.
        generators: whose numbers the steps may draw.
        random: the step draws some, so they are replayed.
    """

    def __init__(
        self,
        cell: Cell,
        inputs: Inputs,
        state: Any,
        plan: Plan,
        parameters: tuple[Tensor, ...],
        generators: Generators,
        random: bool,
    ) -> None:
        self._cell, self._inputs, self._plan = cell, inputs, plan
        self._parameters, self._generators, self._random = parameters, generators, random
        self._known = {id(tensor) for tensor in parameters}
        self._autocast = Autocast.current([*inputs.leaves, *flatten(state)[0], *parameters])
        modules = cell.modules()
        self._flags, self._module_tensors = Flags.current(modules, parameters), ModuleTensors(modules)
        self._fingerprints = Fingerprints(inputs.length, self._autocast.precision)
        self._start = self._hold(map_tensors(torch.detach, state))
        # Backward needs the graph of the first step only towards what the caller asked for.
        self.initial_needs_grad = [isinstance(t, Tensor) and t.requires_grad for t in flatten(state)[0]]
        self.inputs_need_grad = [isinstance(t, Tensor) and t.requires_grad for t in inputs.leaves]
        self._shapes = flatten(self._start.state)
        self._reset()

    def _reset(self) -> None:
        """Let go of everything stored."""
        self._hidden: dict[int, _Held] = {}
        self._graphs: dict[int, _Graph] = {}
        self._next = 0
        self._state: Any = self._start.state

    def forward(self, collector: Collector | None) -> Any:
        """The forward pass. Returns the final state, copied; outputs go to the collector."""
        self._reset()
        try:
            self._restore(0)
            before = self._generators.get()
            actions = self._plan.actions
            while actions[self._next].op is not Op.BACK:
                self._do(actions[self._next], collector)
                self._next += 1
            if not (self._random or self._generators.get().equals(before)):
                raise RecomputeError(
                    "a later step draws random numbers and the first did not, so nothing was set up to replay them: "
                    "draw in the first step too, for example with torch.rand(())"
                )
            self._refuse_changed(
                "a step changes {what}, so running it again would change it again: keep it in the state"
            )
            return map_tensors(torch.clone, self._state)
        except BaseException:
            self._reset()
            raise

    def backward(
        self,
        output_grads: list[Tensor | None],
        collector: Collector,
        final_grads: list[Tensor | None],
        needs: list[bool],
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """The backward pass: gradients of the initial state, the inputs and the parameters.

        A second call, after `retain_graph=True`, runs the forward pass again first.

        Args:
            output_grads: gradients of the collector's leaves.
            final_grads: gradients of the final state's leaves.
            needs: which of the initial state's leaves, the inputs and the parameters need one, in this order.
        """
        states, inputs = len(self.initial_needs_grad), len(self._inputs.leaves)
        self.initial_needs_grad = needs[:states]
        self.inputs_need_grad = needs[states : states + inputs]
        wanted = [index for index, need in enumerate(needs[states + inputs :]) if need]
        sums: list[Tensor | None] = [None] * len(self._parameters)
        input_grads = InputGrads(self._inputs)
        carry = final_grads
        outside = self._generators.get() if self._random else None
        try:
            self._refuse_changed("{what} changed between the forward and the backward pass: call backward first")
            with self._autocast.restored(), self._flags.restored():
                if not self._next:
                    self.forward(None)
                for action in self._plan.actions[self._next :]:
                    if action.op is Op.BACK:
                        grads = collector.grads(action.to, output_grads)
                        carry = self._back(action.to, grads, carry, input_grads, wanted, sums)
                    else:
                        self._do(action, None)
            self._fingerprints.verify()
        finally:
            self._reset()
            if outside is not None:
                self._generators.set(outside)
        return carry, input_grads.grads, sums

    def _do(self, action: Action, collector: Collector | None) -> None:
        """Anything but a backward."""
        if action.op is Op.ADVANCE:
            for step in range(action.at + 1, action.to + 1):
                self._advance(step, collector)
        elif action.op is Op.RUN:
            self._run(action.to, collector)
        elif action.op is Op.STORE:
            self._hidden[action.at] = self._hold(self._state)
        elif action.op is Op.DROP:
            del self._hidden[action.at]
        else:
            self._restore(action.at)

    def _advance(self, step: int, collector: Collector | None) -> None:
        """Run a step for its state alone."""
        leaves, spec = self._inputs.at(step)
        # Autocast caches cast weights; one cast made without grad would cut later graphs off from the weights, so under
        # autocast every step records, and its graph goes at once.
        with torch.set_grad_enabled(self._autocast.active):
            output, state = self._cell(unflatten(leaves, spec), self._state, step)
        if collector is not None:
            self._first_visit(step, output, state, collector)
        self._state = copy_state(state)

    def _run(self, step: int, collector: Collector | None) -> None:
        """Run a step and keep its graph."""
        state_leaves, spec = flatten(self._state)
        input_leaves, input_spec = self._inputs.at(step)
        with torch.enable_grad():
            first_node = node_number()
            state_leaves = [
                leaf_of(leaf, step > 1 or needed) if isinstance(leaf, Tensor) else leaf
                for leaf, needed in zip(state_leaves, self.initial_needs_grad, strict=True)
            ]
            input_leaves = [
                leaf_of(leaf, self.inputs_need_grad[self._inputs.index(step, at)]) if isinstance(leaf, Tensor) else leaf
                for at, leaf in enumerate(input_leaves)
            ]
            output, state = self._cell(unflatten(input_leaves, input_spec), unflatten(state_leaves, spec), step)
        outputs, states = flatten(output)[0], flatten(state)[0]
        self._look_for_strangers(step, [*outputs, *states], [*state_leaves, *input_leaves], first_node)
        if collector is not None:
            self._first_visit(step, output, state, collector)
        else:
            self._fingerprints.compare(step, [*outputs, *states])
        self._state = copy_state(state)
        self._graphs[step] = _Graph(
            state_leaves, input_leaves, [_edge(leaf) for leaf in (*outputs, *states)], self._hold(self._state)
        )

    def _back(
        self,
        step: int,
        output_grads: list[Tensor | None],
        state_grads: list[Tensor | None],
        input_grads: InputGrads,
        wanted: list[int],
        sums: list[Tensor | None],
    ) -> list[Tensor | None]:
        """Backpropagate through a step; returns the gradients of the state before it."""
        graph = self._graphs.pop(step)
        self._state = None
        # An output that is part of the state too is one root: autograd checks every root it is given.
        roots: dict[GradientEdge, Tensor] = {}
        for edge, grad in zip(graph.edges, [*output_grads, *state_grads], strict=True):
            if edge is not None and grad is not None:
                roots[edge] = roots[edge] + grad if edge in roots else grad
        before: list[Tensor | None] = [None] * len(graph.state_leaves)
        if not roots:
            return before
        at_state = [i for i, leaf in enumerate(graph.state_leaves) if _is_leaf(leaf)]
        at_input = [i for i, leaf in enumerate(graph.input_leaves) if _is_leaf(leaf)]
        targets = [
            *(graph.state_leaves[i] for i in at_state),
            *(graph.input_leaves[i] for i in at_input),
            *(self._parameters[i] for i in wanted),
        ]
        if not targets:
            return before
        grads = list(torch.autograd.grad(list(roots), targets, list(roots.values()), allow_unused=True))
        grads.reverse()  # taken from the end, so that each is freed before the next is dealt with
        for i in at_state:
            before[i] = grads.pop()
        for i in at_input:
            input_grads.put(step, i, grads.pop())
        for i in wanted:
            grad, held = grads.pop(), sums[i]
            if grad is None:
                continue
            # The first gradient may share memory with others, so it is copied before anything is added to it.
            sums[i] = grad.clone() if held is None else held.add_(grad)
            del grad
        return before

    def _restore(self, position: int) -> None:
        """Go on from a kept state."""
        if position == 0:
            held = self._start
        elif position in self._hidden:
            held = self._hidden[position]
        else:
            held = self._graphs[position].behind
        if held.versions != _versions(held.state):
            raise RecomputeError(
                f"the state behind step {position} was changed in place after it was stored: "
                "a step must make new tensors, not write into its state"
            )
        self._state = held.state
        if held.rng is not None:
            self._generators.set(held.rng)

    def _hold(self, state: Any) -> _Held:
        return _Held(state, _versions(state), self._generators.get() if self._random else None)

    def _first_visit(self, step: int, output: Any, state: Any, collector: Collector) -> None:
        """The state keeps its structure, shapes and size; the output goes to the caller; both are remembered."""
        new = flatten(state)
        check_state(step, self._shapes, new)
        if tensor_bytes(new[0]) > self._plan.hidden_bytes:
            raise RecomputeError(
                f"the state behind step {step} takes {tensor_bytes(new[0])} bytes, more than the "
                f"{self._plan.hidden_bytes} measured: its type must not widen on the way"
            )
        collector.put(step, map_tensors(torch.detach, output))
        self._fingerprints.record(step, [*flatten(output)[0], *new[0]])

    def _refuse_changed(self, message: str) -> None:
        what = self._module_tensors.changed()
        if what is not None:
            raise RecomputeError(message.format(what=what))

    def _look_for_strangers(self, step: int, outputs: list[Any], leaves: list[Any], first_node: int) -> None:
        """Refuse tensors that the first step did not show: their gradients would be lost."""
        own = {id(leaf) for leaf in leaves}
        for tensor in graph_parameters(outputs, self._parameters, first_node):
            if id(tensor) not in self._known and id(tensor) not in own:
                raise RecomputeError(
                    f"step {step} uses a parameter of shape {tuple(tensor.shape)} that the first step did not: "
                    "pass all parameters of the step in `parameters`"
                )


def _versions(state: Any) -> list[int]:
    return [leaf._version for leaf in flatten(state)[0] if isinstance(leaf, Tensor)]


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _edge(tensor: Any) -> GradientEdge | None:
    """Where a gradient of this tensor enters the graph; None if none can."""
    return get_gradient_edge(tensor) if isinstance(tensor, Tensor) and tensor.requires_grad else None
