"""The choice of a bit-width at every decoding step (DP-LLM, sections 4 and 5), made before the linear that it is for.

q, k, v of layer i are decided from layer i's input norm of the residual that enters layer i-1's post-attention norm, gate and up from
the post-attention norm of the residual that enters the layer's input norm: the same token, one sub-layer earlier. o, down and the
first layer's q, k, v are decided from their own input. One call into compiled code decides for all that read one input, which is
normed once and measured once; in Python each decision would cost as much as a small product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from millpond import ops
from millpond.ops.width_choice import Estimators, rms_norm
from millpond.precision.calibration import Choice
from millpond.precision.decoder import decoder_of, linears
from millpond.precision.linear import NestedLinear

EARLY = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linears that are decided one sub-layer earlier (but not in the first layer's attention)."""


def early_inputs(model: Any, seen: Callable[[str, Any, Tensor], None]) -> list[Any]:
    """Call `seen(prefix, norm, x)` for each sub-layer, such as "3.self_attn": its early input is norm(x), x [..., hidden].

    Returns:
        The hooks.
    """
    layers = list(decoder_of(model).layers)
    hooks = []
    for index, layer in enumerate(layers):

        def before_input(module: Any, args: tuple[Tensor, ...], index: int = index, layer: Any = layer) -> None:
            seen(f"{index}.mlp", layer.post_attention_layernorm, args[0])

        def before_post(module: Any, args: tuple[Tensor, ...], index: int = index) -> None:
            if index + 1 < len(layers):
                seen(f"{index + 1}.self_attn", layers[index + 1].input_layernorm, args[0])

        hooks.append(layer.input_layernorm.register_forward_pre_hook(before_input))
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(before_post))
    return hooks


class Chooser:
    """Decides for several linears from one input.

    Args:
        choices: of the linears.
        columns: K of that input.
        norm: the module that stands between the given input and the one that the estimates read; None for none.
    """

    def __init__(self, choices: Sequence[Choice], columns: int, norm: Any = None) -> None:
        scale, epsilon = (None, 0.0) if norm is None else plain_norm(norm)
        self._norm = norm if scale is None else None  # another kind of norm is called, not copied
        lines = [(one.slope, one.intercept, one.threshold) for one in choices]
        self._estimators = Estimators(columns, lines, [one.projection for one in choices], scale, epsilon)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Rows [T, K] -> for each linear bool [T], True for the high bit-width."""
        return ops.exceed(x if self._norm is None else self._norm.forward(x), self._estimators)


@torch.no_grad()
def plain_norm(norm: Any) -> tuple[Tensor | None, float]:
    """Weight (float32) and epsilon of a module that is x / rms(x) * weight; None for the weight where it is anything else."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.device.type != "cpu":
        return None, 0.0
    scale = weight.float().contiguous()
    x = torch.linspace(-2, 3, len(scale))[None].to(weight.dtype)
    close = torch.allclose(norm.forward(x).float(), rms_norm(x, scale, epsilon), rtol=0.02, atol=0.02)
    return (scale, float(epsilon)) if close else (None, 0.0)


class Selector:
    """Decides for one linear.

    Args:
        choice: the pair, the threshold and the estimator.
        columns: K of the linear.

    Attributes:
        early: this step's decisions, bool [T], where they were made early; None until they are.
        estimates: where calibration collects every estimate; None otherwise.
    """

    def __init__(self, choice: Choice, columns: int) -> None:
        self.choice = choice
        self.early: Tensor | None = None
        self.estimates: list[Tensor] | None = None
        self._alone = Chooser([choice], columns)

    def decide(self, x: Tensor) -> Tensor:
        """Rows [T, K] -> bool [T], True for the high bit-width."""
        if self.estimates is not None:
            self.estimates.append(self.choice.estimate(x))
        return self._alone(x)[0]

    def __call__(self, rows: Tensor) -> Tensor:
        decided, self.early = self.early, None
        if decided is not None and decided.shape[0] == rows.shape[0]:
            return decided
        return self.decide(rows)


class _Group:
    """The linears of one sub-layer that are decided early, together."""

    def __init__(self) -> None:
        self.selectors: list[Selector] = []
        self.linears: list[NestedLinear] = []
        self.chooser: Chooser | None = None

    def decide(self, norm: Any, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if any(selector.estimates is not None for selector in self.selectors):
            for selector in self.selectors:
                selector.early = selector.decide(norm.forward(rows))
            return
        if self.chooser is None:
            self.chooser = Chooser([selector.choice for selector in self.selectors], x.shape[-1], norm)
        for selector, decided in zip(self.selectors, self.chooser(rows), strict=True):
            selector.early = decided


def select(model: Any, choices: dict[str, Choice]) -> list[Any]:
    """Give every linear its pair and its selector; returns the hooks that feed the early ones."""
    groups: dict[str, _Group] = {}
    for name, linear in linears(model):
        choice = choices[name]
        linear.set_bits(choice.low, choice.high)
        selector = Selector(choice, linear.columns)
        linear.choose = selector
        if choice.early and choice.low != choice.high:
            group = groups.setdefault(name.rpartition(".")[0], _Group())
            group.selectors.append(selector)
            group.linears.append(linear)

    def seen(prefix: str, norm: Any, x: Tensor) -> None:
        group = groups.get(prefix)
        if group is not None and (x.shape[-2] == 1 or group.linears[0].every_token):
            group.decide(norm, x)

    return early_inputs(model, seen) if groups else []


@contextmanager
def every_token(model: Any) -> Iterator[None]:
    """Inside, each token of a longer input is decided and multiplied as a decoding step of its own."""
    chosen = [linear for _, linear in linears(model)]
    for linear in chosen:
        linear.every_token = True
    try:
        yield
    finally:
        for linear in chosen:
            linear.every_token = False
