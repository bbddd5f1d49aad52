"""What bench/precision.py compares DP-LLM with: fixed bit-widths, the same rates by a coin, and decisions by exact differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millpond import precision
from millpond.precision.allocate import allocate
from millpond.precision.calibration import Choice
from millpond.precision.decoder import linears
from millpond.precision.folder import Description, read_linears
from millpond.precision.nested import product

__all__ = ["at_random", "exactly", "static", "unhook"]


def static(folder: Path, target: float, order: int) -> dict[str, Choice]:
    """One fixed bit-width a linear so that the mean is at most the target: the integer programme on bits instead of bytes."""
    description = Description.load(folder)
    bit_widths = list(range(3, 7))
    names, errors, sizes = [], [], []
    for index in range(description.layers):
        for name, weight, _, error in read_linears(folder, description, index):
            names.append(name)
            errors.append([float(error[order, bits - description.bits[0]]) for bits in bit_widths])
            sizes.append([weight.rows * weight.columns * bits for bits in bit_widths])
    total = sum(size[0] for size in sizes) // bit_widths[0]
    found = allocate(np.array(errors), np.array(sizes), bit_widths, math.floor(target * total))
    return {name: Choice(bits, bits) for name, bits in zip(names, found.bits, strict=True)}


def at_random(choices: dict[str, Choice], shares: dict[str, float], model: Any) -> None:
    """The same pairs at the same rates, decided by a coin: what is left when the selector is taken away."""
    rng = torch.Generator().manual_seed(0)
    for name, linear in linears(model):
        linear.set_bits(choices[name].low, choices[name].high)
        linear.choose = lambda rows, share=shares[name]: torch.rand(len(rows), generator=rng) < share


class Exact:
    """Decides by the exact difference of the two bit-widths: what the estimators stand for. First it gathers, then it decides."""

    def __init__(self, linear: Any, share_low: float) -> None:
        self.linear, self.share_low = linear, share_low
        self.gathered: list[torch.Tensor] = []
        self.threshold: float | None = None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        apart = (product(weight, self.linear.high, rows) - product(weight, self.linear.low, rows)).norm(dim=-1)
        if self.threshold is None:
            self.gathered.append(apart)
            return torch.rand(len(rows)) > self.share_low
        return apart > self.threshold


def exactly(model: Any, choices: dict[str, Choice], shares: dict[str, float], samples: torch.Tensor) -> None:
    """The same pairs and rates, decided by exact differences."""
    made = {}
    for name, linear in linears(model):
        linear.set_bits(choices[name].low, choices[name].high)
        linear.choose = made[name] = Exact(linear, 1 - shares[name])
    precision.perplexity(model, samples)
    for exact in made.values():
        if exact.gathered:
            exact.threshold = float(torch.cat(exact.gathered).double().quantile(exact.share_low))


def unhook(model: Any) -> None:
    for hook in model.precision_hooks:
        hook.remove()
    model.precision_hooks = []
