"""Perplexity as decoding would have it: every token decided and multiplied as a step of its own, many at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from millpond.precision.selection import every_token


def perplexity(model: Any, samples: Tensor) -> float:
    """exp of the mean loss over runs of text, int64 [S, T]; see `losses`."""
    return math.exp(float(losses(model, samples).mean()))


@torch.no_grad()
def losses(model: Any, samples: Tensor) -> Tensor:
    """Mean loss of each run, nats a token: float64 [S] for int64 [S, T].

    A decision depends only on its own token's inputs, so running the tokens together gives each what it would have had in a
    step by itself (tests/precision/test_runtime.py compares the two).
    """
    found = []
    with every_token(model):
        for ids in samples:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            found.append(float(functional.cross_entropy(logits, ids[1:])))
    return torch.tensor(found, dtype=torch.float64)
