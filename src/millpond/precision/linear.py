"""A linear layer that reads only the bit planes it needs, at a bit-width chosen per layer and per decoding step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from millpond.errors import PrecisionError
from millpond.precision.nested import NestedWeight, product


class NestedLinear(nn.Module):
    """y = x W_b^T + bias for a nested weight.

    A prompt (more than one token a sequence) runs at the greatest bit-width kept. A decoding step runs at `low` or `high`: where these
    differ, `choose` says for each row which of the two.

    Args:
        weight: the planes and tables that are kept.
        bias: [N], or None.

    Attributes:
        low, high: the pair of bit-widths of a decoding step; equal for a fixed one.
        choose: rows [T, K] -> bool [T], True for the high one; None takes the high one.
        every_token: treat each token of a longer input as a decoding step of its own (for measuring; same numbers, see
            `millpond.precision.perplexity`).
        counts: rows of decoding steps that ran at each bit-width.
    """

    def __init__(self, weight: NestedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.columns = weight.columns
        self.register_buffer("planes", weight.planes)
        for bits, table in weight.tables.items():
            self.register_buffer(f"table_{bits}", table)
        self._weight: NestedWeight | None = None
        self.bit_widths = tuple(sorted(weight.tables))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.low = self.high = self.bit_widths[-1]
        self.choose: Callable[[Tensor], Tensor] | None = None
        self.every_token = False
        self.counts: dict[int, int] = {}

    @property
    def weight(self) -> NestedWeight:
        """The stored weight (no copy)."""
        if self._weight is None:
            tables = {bits: getattr(self, f"table_{bits}") for bits in self.bit_widths}
            self._weight = NestedWeight(self.planes, tables, self.columns)  # type: ignore[arg-type]
        return self._weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        """Move to another device; planes and tables keep their dtype, also where the rest of a model gets another."""
        self._weight = None
        own = {id(buffer) for buffer in self.buffers()}
        super()._apply(lambda tensor: fn(tensor).to(tensor.dtype) if id(tensor) in own else fn(tensor), recurse)
        return self

    @property
    def size(self) -> int:
        """Number of weights, N x K."""
        return int(self.planes.shape[0]) * self.columns  # type: ignore[index]

    def set_bits(self, low: int, high: int) -> None:
        """The pair of a decoding step.

        Raises:
            PrecisionError: no table is kept for it.
        """
        for bits in (low, high):
            if bits not in self.bit_widths:
                raise PrecisionError(
                    f"no table for {bits} bits is kept; there are: {', '.join(map(str, self.bit_widths))}"
                )
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        rows = x.reshape(-1, self.columns)
        step = x.dim() < 2 or x.shape[-2] == 1 or self.every_token
        if not step:
            y = product(self.weight, self.bit_widths[-1], rows)
        elif self.low == self.high or self.choose is None:
            y = product(self.weight, self.high, rows)
            self._count(self.high, len(rows))
        else:
            y = self._chosen(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)

    def _chosen(self, rows: Tensor) -> Tensor:
        assert self.choose is not None
        high = self.choose(rows)
        picked = int(high.sum())
        self._count(self.high, picked)
        self._count(self.low, len(rows) - picked)
        if picked in (0, len(rows)):
            return product(self.weight, self.high if picked else self.low, rows)
        y = rows.new_empty(len(rows), int(self.planes.shape[0]))  # type: ignore[index]
        y[high] = product(self.weight, self.high, rows[high])
        y[~high] = product(self.weight, self.low, rows[~high])
        return y

    def _count(self, bits: int, rows: int) -> None:
        if rows:
            self.counts[bits] = self.counts.get(bits, 0) + rows
