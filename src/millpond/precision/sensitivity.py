"""How much the loss minds an error in a weight: sums over calibration text of gradients, and of their squares.

One layer at a time: a forward pass of every sample writes what enters each layer to a file; then, from the last layer to the first, each is run
again by itself and its gradients are summed up. Beside the model only one layer's sums are in memory, not the whole model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from millpond.errors import PrecisionError
from millpond.memory.budget import format_bytes
from millpond.precision.decoder import decoder_of, linears

STATE = "sensitivity.state"
"""File with what enters every layer; an interrupted run goes on from it."""


def samples_of(tokenizer: Any, text: str, *, samples: int, length: int) -> Tensor:
    """The first `samples` runs of `length` tokens of a text: int64 [samples, length].

    Raises:
        PrecisionError: the text is too short for a single run.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(samples, len(ids) // length)
    if count == 0:
        raise PrecisionError(f"the calibration text has {len(ids)} tokens; at least {length} are needed")
    return torch.tensor(ids[: count * length]).view(count, length)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Sums over S calibration samples for the linears of one decoder layer, by name: float32 [N, K] each.

    Attributes:
        index: of the layer.
        samples: S.
        gradient: sum of dL/dW.
        square: sum of (dL/dW)^2, the diagonal of the empirical Fisher matrix.
    """

    index: int
    samples: int
    gradient: dict[str, Tensor]
    square: dict[str, Tensor]


class _States:
    """[layers + 2, samples] hidden states [1, T, hidden] in a file: what enters each layer, and two rows of gradients that take turns."""

    def __init__(self, path: Path, samples: int, like: Tensor) -> None:
        self.path, self.samples = path, samples
        self.shape, self.dtype, self.nbytes = like.shape, like.dtype, like.numel() * like.element_size()

    def write(self, row: int, sample: int, state: Tensor) -> None:
        with self.path.open("r+b") as file:
            file.seek((row * self.samples + sample) * self.nbytes)
            file.write(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def read(self, row: int, sample: int, device: torch.device) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek((row * self.samples + sample) * self.nbytes)
            file.readinto(found.reshape(-1).view(torch.uint8).numpy().data)
        return found.to(device)


def sensitivities(
    model: Any, samples: Tensor, folder: Path | None = None, *, first: int | None = None, quiet: bool = True
) -> Iterator[Sensitivity]:
    """Sum up gradients of the loss for every decoder linear (Any-Precision LLM, section 3); yields a layer at a time, the last one first.

    A file of S (layers + 2) T hidden elements is written into `folder`, and found again there.

    Args:
        samples: int64 [S, T], each a run of text.
        folder: where the file goes, and stays when the run is cut off; by default one that is removed.
        first: the layer to begin with, where an earlier run was cut off behind it.

    Raises:
        PrecisionError: no sample, or no room for the file.
    """
    if not len(samples):
        raise PrecisionError("there is no calibration text")
    layers = list(decoder_of(model).layers)
    if first is None or folder is None or not (folder / STATE).exists():
        first = len(layers) - 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with TemporaryDirectory() as scratch:
        states, given = _forward(model, layers, samples, (folder or Path(scratch)) / STATE, quiet)
        named = dict(linears(model))
        for index in range(first, -1, -1):
            own = {name: part for name, part in named.items() if name.split(".")[0] == str(index)}
            found = Sensitivity(
                index,
                len(samples),
                *(
                    {name: torch.zeros_like(part.weight, dtype=torch.float32) for name, part in own.items()}
                    for _ in "gs"
                ),
            )
            incoming, outgoing = len(layers) + (index + 1) % 2, len(layers) + index % 2
            for part in own.values():
                part.weight.requires_grad_(True)
            for sample in range(len(samples)):
                device = layers[index].self_attn.q_proj.weight.device
                x = states.read(index, sample, device).requires_grad_(True)
                y = _hidden(given[index](x))
                above = states.read(incoming, sample, device)
                *grads, below = torch.autograd.grad(y, [*(part.weight for part in own.values()), x], above)
                states.write(outgoing, sample, below)
                for name, grad in zip(own, grads, strict=True):
                    found.gradient[name] += grad
                    found.square[name].addcmul_(grad.float(), grad.float())
            for part in own.values():
                part.weight.requires_grad_(False)
            yield found


def _hidden(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _forward(
    model: Any, layers: list[Any], samples: Tensor, path: Path, quiet: bool
) -> tuple[_States, dict[int, Callable[[Tensor], Any]]]:
    """Fill the file with what enters every layer and with the gradient of the loss behind the last one.

    Returns:
        The file, and every layer with all that it was called with except the hidden states: the same for all samples, equally long.
    """
    given: dict[int, Callable[[Tensor], Any]] = {}
    entering: dict[int, Tensor] = {}
    leaf: list[Tensor] = []

    def enters(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = layers.index(layer)
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        given[index] = lambda x: layer(x, *args[1:], **rest)
        entering[index] = args[0] if args else kwargs["hidden_states"]

    def leaves(_: Any, __: Any, out: Any) -> Any:
        leaf.append(_hidden(out).detach().requires_grad_(True))
        return (leaf[-1], *out[1:]) if isinstance(out, tuple) else leaf[-1]

    def run(ids: Tensor) -> Tensor:
        """The gradient behind the last layer."""
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, ids[1:].to(logits.device))
        return torch.autograd.grad(loss, leaf.pop())[0]

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leaves))
    try:
        gradient = run(samples[0])  # also where the file is there: what the layers are called with is not in it
        if path.exists():
            return _States(path, len(samples), entering[0]), given
        part = path.with_suffix(".part")
        states = _States(part, len(samples), entering[0])
        need, free = states.nbytes * len(samples) * (len(layers) + 2), shutil.disk_usage(path.parent).free
        if need > free:
            raise PrecisionError(
                f"the calibration text's hidden states take {format_bytes(need)} on disk and {format_bytes(free)} are free: "
                "give fewer or shorter samples"
            )
        part.touch()
        for sample, ids in enumerate(tqdm(samples, desc="forward", unit="sample", disable=quiet)):
            gradient = run(ids)
            for index, state in entering.items():
                states.write(index, sample, state)
            states.write(len(layers) + len(layers) % 2, sample, gradient)
        part.replace(path)
        states.path = path
    finally:
        for hook in hooks:
            hook.remove()
    return states, given
