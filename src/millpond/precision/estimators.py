"""How far apart two bit-widths of a layer are on a token, without computing both (DP-LLM, section 4), and where to draw the line.

e(x) = ||(W_high - W_low) x||. Where e is nearly proportional to ||x|| a line does (R^2 >= 0.9), elsewhere a random projection:
e ~ ||G x|| with G = A (W_high - W_low), A ~ N(0, 1/k) (Johnson and Lindenstrauss).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from millpond.precision.calibration import Choice
from millpond.precision.decoder import linears
from millpond.precision.linear import NestedLinear
from millpond.precision.nested import product
from millpond.precision.pairs import Pair
from millpond.precision.selection import EARLY, Selector, early_inputs, every_token, select

_GOOD_LINE = 0.9
_MOST_DIRECTIONS = 64


def directions(rows: int) -> int:
    """Directions of a projection for a matrix of N rows: 64 as published, on small matrices N / 16 in whole fours.

    All of them are read at every step: N / 16 in bfloat16 are one bit a weight.
    """
    return min(_MOST_DIRECTIONS, max(4, rows // 16 // 4 * 4), max(1, rows // 16))


@dataclass
class Fit:
    """What was seen of one linear on calibration tokens.

    Attributes:
        exact: e of every token.
        norm: norms of the input that the estimate reads.
        projected: norms of its projection.
        r2: of the line.
    """

    exact: list[Tensor] = field(default_factory=list)
    norm: list[Tensor] = field(default_factory=list)
    projected: list[Tensor] = field(default_factory=list)
    r2: float = 0.0


class _Probe:
    """Stands where a selector will: measures, and decides at random with the pair's share."""

    def __init__(self, linear: NestedLinear, pair: Pair, early: bool, projection: Tensor, rng: torch.Generator) -> None:
        self.linear, self.pair, self.early, self.projection, self.rng = linear, pair, early, projection, rng
        self.ahead: Tensor | None = None
        self.fit = Fit()

    def __call__(self, rows: Tensor) -> Tensor:
        weight = self.linear.weight
        apart = product(weight, self.pair.high, rows).float() - product(weight, self.pair.low, rows).float()
        read = rows.float() if self.ahead is None else self.ahead.float()
        self.ahead = None
        self.fit.exact.append(torch.linalg.vector_norm(apart, dim=-1))
        self.fit.norm.append(torch.linalg.vector_norm(read, dim=-1))
        self.fit.projected.append(torch.linalg.vector_norm(read @ self.projection.float().T, dim=-1))
        return torch.rand(len(rows), generator=self.rng) > self.pair.share_low


@torch.no_grad()
def choose_estimators(
    model: Any, pairs: dict[str, Pair], samples: Tensor, *, seed: int = 0
) -> tuple[dict[str, Choice], dict[str, Fit]]:
    """Fit an estimator for every linear on the inputs that a decoding step would see, and draw a first threshold.

    Args:
        model: a loaded quantized model. samples: int64 [S, T] of calibration text.

    Returns:
        Choices with thresholds at the share's quantile of the *estimate*, and what they were fitted on.
    """
    rng = torch.Generator().manual_seed(seed)
    probes: dict[str, _Probe] = {}
    for name, linear in linears(model):
        pair = pairs[name]
        linear.set_bits(pair.low, pair.high)
        linear.choose = None
        if pair.low == pair.high:
            continue
        probes[name] = _Probe(linear, pair, _is_early(name), _projection(linear, pair, rng), rng)
        linear.choose = probes[name]

    def seen(prefix: str, norm: Any, x: Tensor) -> None:
        for name, probe in probes.items():
            if probe.early and name.rpartition(".")[0] == prefix:
                probe.ahead = norm.forward(x).reshape(-1, x.shape[-1])

    hooks = early_inputs(model, seen)
    _run_as_steps(model, samples, hooks)
    choices = {
        name: _choice(probes[name], pair) if name in probes else Choice(pair.low, pair.high)
        for name, pair in pairs.items()
    }
    return choices, {name: probe.fit for name, probe in probes.items()}


def _run_as_steps(model: Any, samples: Tensor, hooks: list[Any]) -> None:
    """Run every token as a decoding step of its own, then take the hooks away."""
    try:
        with every_token(model):
            for ids in samples:
                model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def _choice(probe: _Probe, pair: Pair) -> Choice:
    fit = probe.fit
    exact, norm, projected = (torch.cat(part).double() for part in (fit.exact, fit.norm, fit.projected))
    slope, intercept, fit.r2 = _line(norm, exact)
    if fit.r2 >= _GOOD_LINE:
        made = Choice(pair.low, pair.high, slope=slope, intercept=intercept, early=probe.early)
        estimate = norm * slope + intercept
    else:
        made = Choice(pair.low, pair.high, projection=probe.projection, early=probe.early)
        estimate = projected
    return replace(made, threshold=float(estimate.quantile(pair.share_low)))


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of least squares."""
    across, up = x - x.mean(), y - y.mean()
    spread = float(across.square().sum())
    slope = float((across * up).sum()) / spread if spread > 0 else 0.0
    total = float(up.square().sum())
    r2 = 1 - float((up - slope * across).square().sum()) / total if total > 0 else 1.0
    return slope, float(y.mean()) - slope * float(x.mean()), r2


def _projection(linear: NestedLinear, pair: Pair, rng: torch.Generator) -> Tensor:
    weight = linear.weight
    count = directions(weight.rows)
    random = torch.randn(count, weight.rows, generator=rng) / count**0.5
    found: Tensor = random @ (weight.dense(pair.high) - weight.dense(pair.low))
    return found.bfloat16()


def _is_early(name: str) -> bool:
    index, _, leaf = name.partition(".")
    return leaf in EARLY and not (index == "0" and leaf.startswith("self_attn"))


@torch.no_grad()
def meet_shares(
    model: Any, pairs: dict[str, Pair], choices: dict[str, Choice], samples: Tensor, *, rounds: int = 2
) -> dict[str, Choice]:
    """Draw the thresholds anew with the decisions in force: they change what later layers see, and so their estimates."""
    for _ in range(rounds):
        seen: dict[str, list[Tensor]] = {}
        hooks = select(model, choices)
        for name, linear in linears(model):
            if isinstance(linear.choose, Selector):
                linear.choose.estimates = seen.setdefault(name, [])
        _run_as_steps(model, samples, hooks)
        choices = {
            name: replace(choice, threshold=float(torch.cat(seen[name]).double().quantile(pairs[name].share_low)))
            if seen.get(name)
            else choice
            for name, choice in choices.items()
        }
    return choices
