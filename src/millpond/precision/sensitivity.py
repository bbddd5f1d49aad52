"""How much the loss minds an error in a weight: sums over calibration text of gradients, and of their squares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from millpond.errors import PrecisionError
from millpond.precision.decoder import linears

__all__ = ["STATE", "Sensitivity", "samples_of", "sensitivities"]

STATE = "sensitivity.state"
"""File in which a run that has not ended keeps its sums."""


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


@dataclass
class Sensitivity:
    """Sums over calibration samples, by linear: float32 [N, K] each.

    Attributes:
        done: samples so far.
        gradient: sum of dL/dW.
        square: sum of (dL/dW)^2, the diagonal of the empirical Fisher matrix.
    """

    done: int
    gradient: dict[str, Tensor]
    square: dict[str, Tensor]


def sensitivities(model: Any, samples: Tensor, folder: Path | None = None) -> Iterator[Sensitivity]:
    """Accumulate gradients of the loss for every decoder linear (Any-Precision LLM, section 3); yields after each sample.

    With `folder` the sums are saved after every eighth sample and found again.

    Args:
        samples: int64 [S, T], each a run of text.
    """
    zeros = [
        {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears(model)} for _ in "gs"
    ]
    found = Sensitivity(0, *zeros)
    state = None if folder is None else folder / STATE
    if state is not None and state.exists():
        _restore(found, state)
        yield found
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = {name: linear.weight.requires_grad_(True) for name, linear in linears(model)}
    for index in range(found.done, len(samples)):
        ids = samples[index][None]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        grads = torch.autograd.grad(loss, list(chosen.values()))
        for name, grad in zip(chosen, grads, strict=True):
            found.gradient[name] += grad
            found.square[name].addcmul_(grad.float(), grad.float())
        found.done = index + 1
        if state is not None and (found.done % 8 == 0 or found.done == len(samples)):
            _save(found, state)
        yield found
    for parameter in chosen.values():
        parameter.requires_grad_(False)


def _save(found: Sensitivity, path: Path) -> None:
    part = path.with_suffix(".part")
    tensors = {f"gradient/{name}": tensor for name, tensor in found.gradient.items()}
    tensors |= {f"square/{name}": tensor for name, tensor in found.square.items()}
    save_file(tensors, part, metadata={"done": str(found.done)})
    part.replace(path)


def _restore(found: Sensitivity, path: Path) -> None:
    with safe_open(path, "pt") as file:
        found.done = int(file.metadata()["done"])
        for key in file.keys():  # noqa: SIM118  (not a dict)
            kind, _, name = key.partition("/")
            getattr(found, kind)[name].copy_(file.get_tensor(key))
