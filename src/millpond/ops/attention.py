"""Attention of a few queries over a memory, summed up per key, in chunks: the matrix of probabilities is never held.

A first pass gathers each query's log-sum-exp over a prompt and the keys, a second one what is wanted of the probabilities.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction, contiguous, contiguous_rows
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_COLUMNS = CFunction("attention.cpp", "attention_columns", "pnnpnpnpnppp", by_dtype=True)


@operation
def add_attention(
    queries: Tensor, prompt: Tensor, keys: Tensor, out: Tensor, chunk: int, last: Tensor | None = None
) -> None:
    """Add to `out`, float32 [n], the sum over queries [r, D] of their attention on each key [n, D]; `chunk` keys at a time.

    Args:
        prompt: keys [P, D] that share the softmax but get no sum.
        last: int64 [r], the last key that each query sees; None for all.
    """
    scaled = _scaled(queries)
    level = _levels(scaled, prompt, keys, chunk, last)
    for first in range(0, keys.shape[0], chunk):
        share = _scores(scaled, keys, first, chunk, last).sub_(level[:, None]).exp_()
        out[first : first + chunk] += share.sum(0)


@add_attention.kernel("cpu")
def _add_attention(
    queries: Tensor, prompt: Tensor, keys: Tensor, out: Tensor, chunk: int, last: Tensor | None = None
) -> Declined | None:
    run = _columns_of(prompt, keys, out, last)
    if run is None or not queries.is_cpu:
        return DECLINED
    _run(run, _scaled(queries), prompt, keys, last, len(keys), sums=out)
    return None


@operation
def attention_moments(
    queries: Tensor, prompt: Tensor, keys: Tensor, mean: Tensor, variance: Tensor, chunk: int, last: Tensor
) -> None:
    """Mean and variance over w queries of their attention on each key, averaged over a group of heads.

    Args:
        queries: [g, w, D]. prompt: keys [P, D] that share the softmax. keys: [n, D], `chunk` at a time.
        mean, variance: float32 [n], written; the variance is unbiased, and 0 for a single query.
        last: int64 [w], the last key that each query sees.
    """
    group, count = queries.shape[:2]
    mean.zero_()
    variance.zero_()
    for members in queries.split(max(1, chunk // count)):
        scaled, own = _scaled(members.flatten(0, 1)), last.repeat(members.shape[0])
        level = _levels(scaled, prompt, keys, chunk, own)
        for first in range(0, len(keys), chunk):
            rows = _scores(scaled, keys, first, chunk, own).sub_(level[:, None]).exp_()
            share = rows.unflatten(0, members.shape[:2])
            middle = share.mean(1, keepdim=True)
            mean[first : first + chunk] += middle.sum((0, 1)) / group
            if count > 1:
                spread = share.sub_(middle).square_().sum((0, 1))
                variance[first : first + chunk] += spread / (group * (count - 1))


@attention_moments.kernel("cpu")
def _attention_moments(
    queries: Tensor, prompt: Tensor, keys: Tensor, mean: Tensor, variance: Tensor, chunk: int, last: Tensor
) -> Declined | None:
    run = _columns_of(prompt, keys, mean, variance, last)
    if run is None or not queries.is_cpu:
        return DECLINED
    group, count = queries.shape[:2]
    mean.zero_()
    variance.zero_()
    for rows in queries:
        _run(run, _scaled(rows), prompt, keys, last, len(keys), sums=mean, variances=variance)
    mean.div_(group * count)
    variance.div_(group)
    return None


@operation
def attention_spread(
    queries: Tensor, prompt: Tensor, keys: Tensor, counted: int, chunk: int, last: Tensor
) -> tuple[float, float]:
    """How wide and how changing the attention of a group's queries on the first `counted` keys is.

    Args:
        queries: [g, w, D]. prompt: keys [P, D] that share the softmax. keys: [n, D], `chunk` at a time.
        last: int64 [w], the last key that each query sees.

    Returns:
        The entropy -sum p log p over heads, queries and counted keys; the sum over heads and counted keys of the variance over the
        queries (unbiased; 0 for a single query).
    """
    count, entropy, variance = queries.shape[1], 0.0, 0.0
    for members in queries.split(max(1, chunk // count)):
        scaled, own = _scaled(members.flatten(0, 1)), last.repeat(members.shape[0])
        level = _levels(scaled, prompt, keys, chunk, own)
        for first in range(0, counted, chunk):
            logs = _scores(scaled, keys[:counted], first, chunk, own).sub_(level[:, None])
            share = logs.exp()
            entropy -= float(logs.mul_(share).nan_to_num_(0).sum())
            if count > 1:
                variance += float(share.unflatten(0, members.shape[:2]).var(dim=1).sum())
    return entropy, variance


@attention_spread.kernel("cpu")
def _attention_spread(
    queries: Tensor, prompt: Tensor, keys: Tensor, counted: int, chunk: int, last: Tensor
) -> tuple[float, float] | Declined:
    run = _columns_of(prompt, keys, last)
    if run is None or not queries.is_cpu:
        return DECLINED
    entropy = variance = 0.0
    for rows in queries:
        totals = (ctypes.c_double * 2)()
        _run(run, _scaled(rows), prompt, keys, last, counted, totals=totals)
        entropy, variance = entropy + totals[0], variance + totals[1]
    return entropy, variance


def _columns_of(prompt: Tensor, keys: Tensor, *vectors: Tensor | None) -> Callable[..., Any] | None:
    """The C function for these keys; None where it does not take them."""
    run = _C_COLUMNS.of(keys.dtype)
    fits = prompt.dtype == keys.dtype and contiguous_rows(keys, prompt)
    return run if fits and contiguous(*(one for one in vectors if one is not None)) else None


def _run(
    run: Callable[..., Any], scaled: Tensor, prompt: Tensor, keys: Tensor, last: Tensor | None, counted: int, **out: Any
) -> None:
    """`out`: sums and variances to be added to, float32 [n], and totals, two float64; as far as they are wanted."""
    arrays = (scaled.data_ptr(), *scaled.shape, prompt.data_ptr(), len(prompt), keys.data_ptr(), len(keys))
    columns = (out[name].data_ptr() if name in out else None for name in ("sums", "variances"))
    run(*arrays, None if last is None else last.data_ptr(), counted, *columns, out.get("totals"))


def _scaled(queries: Tensor) -> Tensor:
    scaled: Tensor = queries.float() * queries.shape[1] ** -0.5
    return scaled.contiguous()


def _scores(scaled: Tensor, keys: Tensor, first: int, chunk: int, last: Tensor | None = None) -> Tensor:
    """float32 [r, c] scores of the keys from `first` on; -inf for those that a query does not see."""
    part = keys[first : first + chunk]
    scores: Tensor = scaled @ part.float().T
    if last is not None:
        at = torch.arange(first, first + part.shape[0], device=keys.device)
        scores.masked_fill_(at > last[:, None], -torch.inf)
    return scores


def _levels(scaled: Tensor, prompt: Tensor, keys: Tensor, chunk: int, last: Tensor | None = None) -> Tensor:
    """Each row's log-sum-exp over the prompt and the keys that it sees: float32 [r]."""
    level = torch.full((scaled.shape[0],), -torch.inf, device=scaled.device)
    for first in range(0, prompt.shape[0], chunk):
        level = torch.logaddexp(level, _scores(scaled, prompt, first, chunk).logsumexp(1))
    for first in range(0, keys.shape[0], chunk):
        level = torch.logaddexp(level, _scores(scaled, keys, first, chunk, last).logsumexp(1))
    return level
