"""Measure one real step: bytes of its state and of its graph, the parameters it uses, whether it draws random numbers.

What a step saves for backward is seen through `torch.autograd.graph.saved_tensors_hooks`. Storage that outlives the
step's graph (parameters, inputs, constants, weights cast once by autocast) is shared by all steps and not counted. What
a custom autograd function keeps as plain attributes, outside `save_for_backward`, is not seen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from millpond.errors import RecomputeError
from millpond.recompute.ambient import Generators
from millpond.recompute.sequence import compact, flatten, tensor_bytes, unflatten


@dataclass(frozen=True)
class StepSize:
    """Bytes of one step.

    Attributes:
        hidden_bytes: the state, from which the sequence can go on; with the random generators' state if the step draws
            random numbers.
        internal_bytes: everything kept to backpropagate through the step: the states before and behind it and what
            autograd saves, without parameters, inputs and whatever else all steps share.
    """

    hidden_bytes: int
    internal_bytes: int


@dataclass(frozen=True)
class Probe:
    """What one step showed.

    Attributes:
        size: its bytes.
        parameters: leaf tensors that need gradients and that the step used.
        random: it drew random numbers.
    """

    size: StepSize
    parameters: tuple[Tensor, ...]
    random: bool


class Cell:
    """A user's step as `(x, state, index) -> (output, state)`, with the loss of the step as output where one is given.

    torch's LSTMCell, GRUCell and RNNCell can be given as they are: their output is the new hidden vector.
    """

    def __init__(self, step: Callable[..., Any], loss: Callable[[Any, int], Tensor] | None) -> None:
        self.step = step
        self.loss = loss

    def __call__(self, x: Any, state: Any, index: int) -> tuple[Any, Any]:
        """Run step `index` (from 1). Raises RecomputeError for a result that is not (output, state)."""
        result = self.step(x, state)
        if isinstance(self.step, nn.RNNCellBase):
            result = (result[0] if isinstance(result, tuple) else result, result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise RecomputeError(f"a step must return (output, state), not {type(result).__name__}")
        output, state = result
        if self.loss is not None:
            output = self.loss(output, index - 1)
            if not isinstance(output, Tensor) or output.dim():
                raise RecomputeError("the per-step loss must return a scalar tensor")
        return output, state

    def modules(self) -> list[nn.Module]:
        """Modules that the step and its loss are, are bound to, or close over."""
        return list(dict.fromkeys(_modules(self.step, 3) + _modules(self.loss, 3)))


def measure(step: Callable[..., Any], x: Any, state: Any, loss: Callable[[Any, int], Tensor] | None = None) -> StepSize:
    """Bytes of one step of `step(x, state) -> (output, state)`, for `millpond.recompute.plan`.

    Args:
        x: the inputs of one step, a pytree. state: a pytree.
        loss: the per-step loss, if one will be used.

    Raises:
        RecomputeError: the step cannot be recomputed; the message says why.
    """
    return probe(Cell(step, loss), x, state, 1).size


def probe(cell: Cell, x: Any, state: Any, index: int, parameters: Iterable[Tensor] = ()) -> Probe:
    """Run one step with a graph, drop it, and report. Random generators are left as they were.

    Args:
        parameters: tensors known to need gradients; those that other operations computed must be among them.
    """
    modules = cell.modules()
    _refuse_stateful(modules)
    buffers = [(name, buffer, buffer._version) for module in modules for name, buffer in module.named_buffers()]
    leaves, spec = flatten(state)
    if not tensor_bytes(leaves):
        raise RecomputeError(
            "the state holds no tensor, so the steps do not depend on each other: call them one by one"
        )
    generators = Generators([*leaves, *flatten(x)[0]])
    before = generators.get()
    seen: dict[StorageWeakRef, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(StorageWeakRef(storage), storage.nbytes())
        # An alias: returning the tensor itself would tie the graph to itself and keep it alive.
        return tensor.detach()

    with torch.enable_grad():
        # Copies, so that the state counts although the caller holds the original.
        fresh = [leaf_of(leaf.clone(), True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        x_leaves, x_spec = flatten(x)
        x_leaves = [leaf_of(leaf, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in x_leaves]
        first_node = node_number()
        with saved_tensors_hooks(see, lambda tensor: tensor):
            output, new = cell(unflatten(x_leaves, x_spec), unflatten(fresh, spec), index)
    new_leaves, new_spec = flatten(new)
    check_state(index, (leaves, spec), (new_leaves, new_spec))
    found = graph_parameters([*flatten(output)[0], *new_leaves], parameters, first_node)
    own = {id(leaf) for leaf in (*fresh, *x_leaves)}
    found = [tensor for tensor in found if id(tensor) not in own]
    for tensor in [*fresh, *new_leaves]:
        if isinstance(tensor, Tensor):
            see(compact(tensor))
    hidden = max(tensor_bytes(leaves), tensor_bytes(new_leaves))
    del output, new, new_leaves, fresh, tensor
    internal = sum(nbytes for storage, nbytes in seen.items() if storage.expired())
    for name, buffer, version in buffers:
        if buffer._version != version:
            raise RecomputeError(
                f"the step changes the buffer {name!r}, so running it again would change it again: "
                "put that module into eval mode, or keep the buffer in the state"
            )
    after = generators.get()
    random = not after.equals(before)
    if random:
        generators.set(before)
    extra = after.nbytes if random else 0
    return Probe(StepSize(hidden + extra, max(internal, hidden) + extra), tuple(found), random)


def leaf_of(tensor: Tensor, needs_grad: bool) -> Tensor:
    """The tensor, detached, as a leaf of a new graph; one that needs gradients if it can carry them."""
    tensor = tensor.detach()
    return tensor.requires_grad_(needs_grad and (tensor.is_floating_point() or tensor.is_complex()))


def check_state(index: int, old: tuple[list[Any], Any], new: tuple[list[Any], Any]) -> None:
    """Refuse a state whose structure or shapes a step changes."""

    if old[1] != new[1]:
        raise RecomputeError(
            f"step {index} changes the structure of the state: it was given {old[1]} and returned {new[1]}; "
            "a step must return (output, state) with a state like the one it was given"
        )
    if _shapes(old[0]) != _shapes(new[0]):
        before, after = ([s if s is None else tuple(s) for s in _shapes(leaves)] for leaves in (old[0], new[0]))
        raise RecomputeError(
            f"step {index} changes the shapes of the state from {before} to {after}: a state that grows "
            "(a KV cache, a list of past outputs) has no fixed size to plan with; give it its full size from the start"
        )


def _shapes(leaves: list[Any]) -> list[torch.Size | None]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


# The node at which the gradient of a leaf tensor ends.
_LEAF_NODE: Any = type(torch.zeros(1, requires_grad=True).clone().grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def graph_parameters(outputs: Iterable[Any], known: Iterable[Tensor], first_node: int) -> list[Tensor]:
    """Leaf tensors that the graph behind `outputs` leads to, in a fixed order.

    Args:
        known: the walk stops at those of them that other operations computed.
        first_node: number of the first node that belongs to the step; the walk refuses older ones, for a gradient
            towards them would be lost.
    """
    stops = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    found: dict[int, Tensor] = {}
    todo: list[Node | None] = [output.grad_fn for output in outputs if isinstance(output, Tensor)]
    visited: set[Node] = set()
    while todo:
        node = todo.pop()
        if node is None or node in visited or node in stops:
            continue
        visited.add(node)
        if type(node) is _LEAF_NODE:
            variable = node.variable  # type: ignore[attr-defined]
            found[id(variable)] = variable
            continue
        if node._sequence_nr() < first_node and not _casts_a_leaf(node):  # type: ignore[attr-defined]
            raise RecomputeError(
                f"the step uses a tensor that needs gradients and was computed outside it (by {node.name()}): "
                "pass it in `parameters`, in the inputs or in the state"
            )
        if getattr(node, "_saved_training", False) and getattr(node, "_saved_running_mean", None) is not None:
            raise RecomputeError(_STATEFUL.format(what="a batch normalisation"))
        todo += [following for following, _ in node.next_functions]
    return list(found.values())


def _casts_a_leaf(node: Node) -> bool:
    """A cast saves nothing, so any number of steps may backpropagate through it; autocast shares its casts of weights."""
    following = [behind for behind, _ in node.next_functions]
    return node.name() == "ToCopyBackward0" and len(following) == 1 and type(following[0]) is _LEAF_NODE


_STATEFUL = (
    "the step updates running statistics ({what} in train mode), which recomputation would update again: "
    "use LayerNorm or GroupNorm, or put it into eval mode"
)


def _refuse_stateful(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, part in module.named_modules():
            tracks = getattr(part, "track_running_stats", False) and part.training
            if tracks and isinstance(part, nn.modules.batchnorm._NormBase):
                what = f"{name or 'the step itself'}, {type(part).__name__}"
                raise RecomputeError(_STATEFUL.format(what=what))


def node_number() -> int:
    """The number that autograd gives to the next node made in this thread."""
    node = torch.zeros((), requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())  # type: ignore[union-attr]


def _modules(value: Any, depth: int) -> list[nn.Module]:
    """Modules that a callable is, is bound to, or closes over."""
    if isinstance(value, nn.Module):
        return [value]
    return [module for part in _parts(value) for module in _modules(part, depth - 1)] if depth else []


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        yield value.__self__
    elif inspect.isfunction(value):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
