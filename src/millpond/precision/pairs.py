"""A pair of adjacent bit-widths for every linear and the share of steps at the lower one (DP-LLM, section 3.3).

One number z a linear is trained, the weights stay: p = min + (max - min) sigmoid(z), low = floor(p), high = ceil(p), and the
layer's output is r W_low x + (1 - r) W_high x with r = 1 - (p - low).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from millpond.precision.decoder import linears, replace
from millpond.precision.linear import NestedLinear
from millpond.precision.nested import MIN_BITS


@dataclass(frozen=True)
class Pair:
    """Bit-widths of a linear and the share of decoding steps at the lower one."""

    low: int
    high: int
    share_low: float


class _Mixed(torch.nn.Module):
    """The soft mixture of two bit-widths; dense, for training only."""

    def __init__(self, linear: NestedLinear, most: int, z: float) -> None:
        super().__init__()
        self.linear, self.most = linear, most
        self.z = torch.nn.Parameter(torch.tensor(z))
        self._dense: tuple[int, Tensor, Tensor] | None = None

    @property
    def precision(self) -> Tensor:
        return MIN_BITS + (self.most - MIN_BITS) * torch.sigmoid(self.z)

    def forward(self, x: Tensor) -> Tensor:
        precision = self.precision
        low = min(int(precision), self.most - 1) if self.most > MIN_BITS else MIN_BITS
        if self._dense is None or self._dense[0] != low:
            high = min(low + 1, self.most)
            base = self.linear.weight.dense(low)
            self._dense = (low, base, self.linear.weight.dense(high) - base)
        _, base, step = self._dense
        share = precision - low if self.most > MIN_BITS else x.new_zeros(())
        y = functional.linear(x.float(), base) + share * functional.linear(x.float(), step)
        return (y if self.linear.bias is None else y + self.linear.bias).to(x.dtype)


def train_pairs(
    model: Any,
    samples: Tensor,
    target: float,
    *,
    start: Mapping[str, float] | None = None,
    alpha: float = 1.0,
    lr: float = 1e-2,
    quiet: bool = False,
) -> dict[str, Pair]:
    """Find the pairs for a mean of `target` bits, weighted by the size of the matrices.

    Loss: cross entropy + alpha * (mean precision - target)^2, AdamW, one step a sample. What is left of the distance to the target
    is closed by shifting all z alike, so that the mean is met exactly.

    Args:
        model: a loaded quantized model with all planes that are kept; its linears are back in place afterwards.
        samples: int64 [S, T].
        start: precisions to begin with; the target for every linear by default. Few steps do not get far from them.
    """
    own: dict[str, NestedLinear] = dict(linears(model))
    mixed: dict[str, _Mixed] = {}
    for name, linear in own.items():
        most = linear.bit_widths[-1]
        share = ((target if start is None else start[name]) - MIN_BITS) / max(most - MIN_BITS, 1)
        mixed[name] = _Mixed(linear, most, _logit(share))
        replace(model, name, mixed[name])
    free = any(part.most > MIN_BITS for part in mixed.values())
    sizes = torch.tensor([float(part.linear.size) for part in mixed.values()])
    optimizer = torch.optim.AdamW([part.z for part in mixed.values()], lr=lr, weight_decay=0.0)
    runs = samples if free else samples[:0]  # with every linear at the smallest bit-width there is nothing to train
    try:
        for ids in tqdm(runs, desc=f"pairs for {target:g} bits", unit="sample", disable=quiet):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            mean = (torch.stack([part.precision for part in mixed.values()]) * sizes).sum() / sizes.sum()
            loss = functional.cross_entropy(logits, ids[1:]) + alpha * (mean - target) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for name, linear in own.items():
            replace(model, name, linear)
    z = torch.tensor([float(part.z.detach()) for part in mixed.values()], dtype=torch.float64)
    limits = torch.tensor([float(part.most) for part in mixed.values()], dtype=torch.float64)
    precision = _meeting(z, limits, sizes.double(), target)
    return {name: _pair(float(p), int(m)) for name, p, m in zip(own, precision, limits, strict=True)}


def _meeting(z: Tensor, most: Tensor, sizes: Tensor, target: float) -> Tensor:
    """Precisions of z shifted by one number so that their weighted mean is the target (or the nearest that can be)."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        precision = MIN_BITS + (most - MIN_BITS) * torch.sigmoid(z + middle)
        if float((precision * sizes).sum() / sizes.sum()) < target:
            low = middle
        else:
            high = middle
    return precision


def _pair(precision: float, most: int) -> Pair:
    low = min(int(precision), most)
    high = min(low + 1, most)
    share = 1.0 - (precision - low)
    if share > 0.99 or high == low:  # always the lower one
        return Pair(low, low, 1.0)
    if share < 0.01:
        return Pair(high, high, 1.0)
    return Pair(low, high, share)


def _logit(share: float) -> float:
    share = min(max(share, 0.02), 0.98)
    return math.log(share / (1 - share))
