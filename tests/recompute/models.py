"""Small recurrent steps and the plain loop that every gradient is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from millpond.recompute.sequence import flatten


class Stack(nn.Module):
    """Two LSTM cells, dropout between them, a read-out; nested state, two outputs."""

    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.low, self.high = nn.LSTMCell(4, width), nn.LSTMCell(width, width)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, x: Tensor, state: dict) -> tuple[dict, dict]:
        low = self.low(x, state["low"])
        high = self.high(self.drop(low[0]), state["high"])
        return {"logits": self.head(high[0]), "norm": high[1].norm()}, {"low": low, "high": high}

    def start(self, batch: int = 2) -> dict:
        width = self.low.hidden_size
        return {name: (torch.randn(batch, width), torch.randn(batch, width)) for name in ("low", "high")}


class Chunk(nn.Module):
    """A chunk of tokens through a gated linear recurrence: x [B, n, D], state [B, D, D]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(width, 3 * width), nn.LayerNorm(width), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mask = torch.ones(x.shape[1], x.shape[1]).tril()
        y = q @ state + ((q @ k.transpose(1, 2)) * mask) @ v / x.shape[1]
        state = torch.sigmoid(self.decay)[:, None] * state + k.transpose(1, 2) @ v / x.shape[1]
        return x + self.out(y), state


def plain(step, inputs, state):
    """The loop itself: a list of outputs, and the final state."""
    outputs = []
    for x in inputs:
        result = step(x, state)
        if isinstance(step, nn.RNNCellBase):
            result = (result[0] if isinstance(result, tuple) else result, result)
        output, state = result
        outputs.append(output)
    return outputs, state


def weigh(tree) -> Tensor:
    """A scalar on which every element of a pytree has its own influence."""
    total = torch.zeros(())
    for leaf in flatten(tree)[0]:
        weights = torch.linspace(0.3, 1.7, leaf.numel(), dtype=torch.float64).reshape(leaf.shape)
        total = total + (leaf.double() * weights).sum()
    return total


def leaves_needing_grad(*trees) -> list[Tensor]:
    """The tensors among the leaves, made to need gradients."""
    return [leaf.requires_grad_() for tree in trees for leaf in flatten(tree)[0]]
