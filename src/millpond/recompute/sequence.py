"""A sequence in, a sequence out: steps of a pytree of inputs, and outputs collected step by step.

Inputs are either a list with one pytree a step, or a pytree of tensors whose first dimension is time. Outputs come back
in the same form. Knows shapes; nothing about plans, graphs or budgets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from millpond.errors import RecomputeError

# Structures of the usual trees, one tensor and flat tuples of tensors, which must not cost a walk at every step.
_TENSOR = "a tensor"


@functools.cache
def _tuple_of(count: int) -> str:
    return f"a tuple of {count} tensors"


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a pytree and its structure, which can be compared and printed."""
    if isinstance(tree, Tensor):
        return [tree], _TENSOR
    if type(tree) is tuple:
        for leaf in tree:
            if not isinstance(leaf, Tensor):
                break
        else:
            return list(tree), _tuple_of(len(tree))
    return pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], spec: Any) -> Any:
    """The pytree of a structure that `flatten` gave, with other leaves."""
    if spec is _TENSOR:
        return leaves[0]
    if isinstance(spec, str):
        return tuple(leaves)
    return pytree.tree_unflatten(leaves, spec)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same pytree with a function applied to every tensor."""
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def tensor_bytes(leaves: list[Any]) -> int:
    """Bytes of the elements of every tensor among the leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def copy_state(state: Any) -> Any:
    """A state with storage of its own wherever a leaf is a view into something larger, so that it keeps only itself."""
    return map_tensors(compact, state)


def compact(tensor: Tensor) -> Tensor:
    """The tensor, detached; copied if its storage holds more than its own elements."""
    tensor = tensor.detach()
    if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


class Inputs:
    """Inputs by step.

    Attributes:
        leaves: all leaves, in a fixed order.
        length: steps T.
        stacked: tensors [T, ...] rather than a list of steps.
    """

    def __init__(self, inputs: Any) -> None:
        self.stacked = not isinstance(inputs, list)
        if self.stacked:
            self.leaves, self._spec = flatten(inputs)
            lengths = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else -1 for leaf in self.leaves}
            if len(lengths) != 1 or -1 in lengths:
                raise RecomputeError(
                    "inputs must be tensors with time as their first dimension, all of one length, or a list with one "
                    f"entry per step; got {[tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]}"
                )
            self.length = lengths.pop()
        else:
            flat = [flatten(step) for step in inputs]
            self._specs = [spec for _, spec in flat]
            self._starts = [0]
            for leaves, _ in flat:
                self._starts.append(self._starts[-1] + len(leaves))
            self.leaves = [leaf for leaves, _ in flat for leaf in leaves]
            self.length = len(inputs)
        if self.length < 1:
            raise RecomputeError("the sequence is empty: it needs at least one step")

    def at(self, step: int) -> tuple[list[Any], Any]:
        """Leaves and structure of the inputs of step 1 <= `step` <= T, views of what the caller holds."""
        if self.stacked:
            return [leaf[step - 1] for leaf in self.leaves], self._spec
        start, end = self._starts[step - 1 : step + 1]
        return self.leaves[start:end], self._specs[step - 1]

    def index(self, step: int, leaf: int) -> int:
        """Where the given leaf of a step stands among all leaves."""
        return leaf if self.stacked else self._starts[step - 1] + leaf

    def largest(self) -> int:
        """The step with the most input bytes: the first, where all have the same."""
        if self.stacked:
            return 1
        return max(range(1, self.length + 1), key=lambda step: tensor_bytes(self.at(step)[0]))


class Collector:
    """Outputs by step: stacked into tensors [T, ...], listed, or summed.

    Every output is copied into storage of its own, so that what the caller does with it cannot reach a stored state.
    """

    def __init__(self, length: int, mode: str) -> None:
        self.length = length
        self.mode = mode  # "stack", "list" or "sum"
        self.leaves: list[Tensor] = []
        self._specs: list[Any] = []
        self._starts = [0]

    def put(self, step: int, output: Any) -> None:
        """Take the output of the next step. Raises RecomputeError if it cannot be collected."""
        leaves, spec = flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise RecomputeError("outputs must consist of tensors; return other results another way, or an empty tuple")
        if self.mode == "list":
            self.leaves += [leaf.detach().clone() for leaf in leaves]
            self._starts.append(len(self.leaves))
            self._specs.append(spec)
        elif step == 1:
            self._specs = [spec]
            if self.mode == "stack":
                self.leaves = [leaf.new_empty((self.length, *leaf.shape)) for leaf in leaves]
                for buffer, leaf in zip(self.leaves, leaves, strict=True):
                    buffer[0].copy_(leaf)
            else:
                self.leaves = [leaf.detach().clone() for leaf in leaves]
        else:
            self._check(step, leaves, spec)
            for buffer, leaf in zip(self.leaves, leaves, strict=True):
                if self.mode == "stack":
                    buffer[step - 1].copy_(leaf)
                else:
                    buffer += leaf

    def _check(self, step: int, leaves: list[Tensor], spec: Any) -> None:
        shapes = [buffer.shape[self.mode == "stack" :] for buffer in self.leaves]
        if spec != self._specs[0] or shapes != [leaf.shape for leaf in leaves]:
            raise RecomputeError(
                f"the output of step {step} has shapes {[tuple(leaf.shape) for leaf in leaves]}, that of step 1 "
                f"{[tuple(shape) for shape in shapes]}: "
                "to stack outputs all steps must agree; pass inputs as a list to get a list of outputs"
            )

    def take(self) -> list[Tensor]:
        """Hand over the leaves, once, so that a job waiting for its backward does not keep outputs alive."""
        leaves, self.leaves = self.leaves, []
        return leaves

    def finish(self, leaves: list[Any]) -> Any:
        """The outputs in the caller's form, from the leaves that `take` gave."""
        if self.mode == "list":
            bounds = zip(self._starts, self._starts[1:], self._specs, strict=False)
            return [unflatten(leaves[start:end], spec) for start, end, spec in bounds]
        return unflatten(leaves, self._specs[0])

    def grads(self, step: int, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients that reach the outputs of one step, from those of the leaves."""
        if self.mode == "list":
            return grads[self._starts[step - 1] : self._starts[step]]
        if self.mode == "stack":
            return [None if grad is None else grad[step - 1] for grad in grads]
        return grads


class InputGrads:
    """Gradients of the inputs, gathered step by step in the form of `Inputs.leaves`."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.grads: list[Tensor | None] = [None] * len(inputs.leaves)

    def put(self, step: int, leaf: int, grad: Tensor | None) -> None:
        """Take the gradient of one leaf of one step."""
        if grad is None:
            return
        at = self._inputs.index(step, leaf)
        if not self._inputs.stacked:
            self.grads[at] = grad
            return
        held = self.grads[at]
        if held is None:
            held = self.grads[at] = torch.zeros_like(self._inputs.leaves[at])
        held[step - 1].copy_(grad)
