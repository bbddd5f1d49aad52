"""Attention of a few proxy queries over the whole memory, in chunks: softmax(q k / sqrt(D)) over the prompt and the view.

A first pass gathers each row's log-sum-exp, a second one what is wanted of the probabilities; the w x n matrix is never held.
The latest tokens' queries see what their model showed them: nothing newer than themselves. A proxy text's queries see all of the
memory and the prompt; the text's own keys, which a compaction never sees, do not count. Knows nothing about what asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millpond import native
from millpond.errors import PolicyError
from millpond.policies.base import TEXT, Shape, View

__all__ = [
    "accumulation_scratch",
    "add_columns",
    "attention_moments",
    "attention_scratch",
    "attention_spread",
    "moments_scratch",
    "proxy_attention",
    "proxy_scratch",
    "spread_scratch",
]

# Query heads to a KV head of the widest models at hand.
_WIDEST_GROUP = 16


def proxy_attention(view: View, *, latest: bool) -> Tensor:
    """Mean over the proxy's queries and the group's heads of the attention on each token: float32 [H, n].

    Args:
        latest: whether the queries are those of the latest tokens, which see nothing newer than themselves.

    Raises:
        PolicyError: the view shows no queries.
    """
    queries, prompt = _proxy(view)
    out = torch.zeros(view.heads, view.tokens, device=view.keys.device)
    at_once = max(1, view.chunk)
    for head, row in enumerate(out):
        rows = queries[head].flatten(0, 1)
        own = _own(view, head).repeat(queries.shape[1]) if latest else None
        for first in range(0, rows.shape[0], at_once):
            part = slice(first, first + at_once)
            last = None if own is None else own[part]
            add_columns(rows[part], prompt[head], view.keys[head], row, view.chunk, last)
        row /= rows.shape[0]
    return out


def attention_moments(view: View) -> tuple[Tensor, Tensor]:
    """Mean and variance over the latest tokens' queries of their attention on each token: float32 [H, n] each.

    Both are taken for each query head over its w rows (the variance unbiased; 0 for a single row), then averaged over the group.

    Raises:
        PolicyError: the view shows no queries.
    """
    queries, prompt = _proxy(view)
    group, count = queries.shape[1:3]
    mean, variance = torch.zeros(2, view.heads, view.tokens, device=view.keys.device)
    for head in range(view.heads):
        own, keys = _own(view, head), view.keys[head]
        if all(
            native.attention(_scaled(rows), prompt[head], keys, last=own, sums=mean[head], variances=variance[head])
            for rows in queries[head]
        ):
            mean[head] /= group * count
            variance[head] /= group
            continue
        for members in queries[head].split(max(1, view.chunk // count)):
            scaled, last = _scaled(members.flatten(0, 1)), own.repeat(members.shape[0])
            level = _levels(scaled, prompt[head], keys, view.chunk, last)
            for first in range(0, view.tokens, view.chunk):
                rows = _scores(scaled, keys, first, view.chunk, last).sub_(level[:, None]).exp_()
                share = rows.unflatten(0, members.shape[:2])
                middle = share.mean(1, keepdim=True)
                mean[head, first : first + view.chunk] += middle.sum((0, 1)) / group
                if count > 1:
                    spread = share.sub_(middle).square_().sum((0, 1))
                    variance[head, first : first + view.chunk] += spread / (group * (count - 1))
    return mean, variance


def attention_spread(view: View) -> tuple[float, float]:
    """How wide and how changing the latest tokens' attention on one layer is, on all others but themselves.

    Returns:
        The entropy -sum p log p over query heads, queries and keys; the sum over query heads and keys of the variance over the
        queries (unbiased; 0 for a single query).

    Raises:
        PolicyError: the view shows no queries.
    """
    queries, prompt = _proxy(view)
    count, entropy, variance = queries.shape[2], 0.0, 0.0
    others = max(0, view.tokens - count)
    for head in range(view.heads):
        own, keys = _own(view, head), view.keys[head]
        totals = [
            native.attention(_scaled(rows), prompt[head], keys, last=own, counted=others) for rows in queries[head]
        ]
        if None not in totals:
            entropy += sum(one[0] for one in totals if one)
            variance += sum(one[1] for one in totals if one)
            continue
        for members in queries[head].split(max(1, view.chunk // count)):
            scaled, last = _scaled(members.flatten(0, 1)), own.repeat(members.shape[0])
            level = _levels(scaled, prompt[head], keys, view.chunk, last)
            for first in range(0, others, view.chunk):
                logs = _scores(scaled, keys[:others], first, view.chunk, last).sub_(level[:, None])
                share = logs.exp()
                entropy -= float(logs.mul_(share).nan_to_num_(0).sum())
                if count > 1:
                    variance += float(share.unflatten(0, members.shape[:2]).var(dim=1).sum())
    return entropy, variance


def add_columns(
    queries: Tensor, prompt: Tensor, keys: Tensor, out: Tensor, chunk: int, last: Tensor | None = None
) -> None:
    """Add to `out`, float32 [n], the sum over queries [r, D] of their attention on each key [n, D]; `chunk` keys at a time.

    Args:
        prompt: keys [P, D] that share the softmax but get no sum.
        last: int64 [r], the last key that each query sees; None for all.
    """
    scaled = _scaled(queries)
    if native.attention(scaled, prompt, keys, last=last, sums=out):
        return
    level = _levels(scaled, prompt, keys, chunk, last)
    for first in range(0, keys.shape[0], chunk):
        share = _scores(scaled, keys, first, chunk, last).sub_(level[:, None]).exp_()
        out[first : first + chunk] += share.sum(0)


def attention_scratch(rows: int, head_dim: int, chunk: int) -> int:
    """The most bytes that attention of `rows` queries at a time allocates, beside its result."""
    # float32: queries and their scaled copy; a chunk of keys; its scores, their exponentials and a mask; levels and columns.
    return 4 * (2 * rows * head_dim + chunk * head_dim + 3 * rows * chunk + 8 * (rows + chunk))


def proxy_scratch(shape: Shape) -> int:
    """The most bytes that `proxy_attention` allocates, beside its result."""
    return attention_scratch(shape.chunk, shape.head_dim, shape.chunk)


def moments_scratch(shape: Shape, queries: int) -> int:
    """The most bytes that `attention_moments` of so many queries allocates, beside the mean."""
    return shape.of_all(torch.float32) + attention_scratch(max(queries, shape.chunk), shape.head_dim, shape.chunk)


def spread_scratch(shape: Shape, queries: int) -> int:
    """The most bytes that `attention_spread` of so many queries allocates."""
    # Beside the attention where the window lies, in one head: int64, twice.
    return attention_scratch(max(queries, shape.chunk), shape.head_dim, shape.chunk) + 2 * shape.of_head(torch.int64)


def accumulation_scratch(head_dim: int, chunk: int) -> int:
    """The most bytes that adding up a block's attention takes, for `View.sums`."""
    # `chunk` of its queries at a time (or one token's group), turned to their positions.
    rows = max(chunk, _WIDEST_GROUP)
    return attention_scratch(rows, head_dim, chunk) + rows * (16 + 30 * head_dim)


def _proxy(view: View) -> tuple[Tensor, Tensor]:
    if view.queries is None or view.prompt_keys is None or view.queries.shape[2] == 0:
        raise PolicyError("there are no proxy queries to score the memory by: only a Session shows them to a policy")
    return view.queries, view.prompt_keys


def _own(view: View, head: int) -> Tensor:
    """Where the latest tokens, whose queries are shown, lie among a head's: int64 [w].

    Remembered turns came behind them and asked nothing. Of those that are gone already, the place of the oldest that is left.
    """
    assert view.queries is not None
    count = view.queries.shape[2]
    own = (view.grid_position[head, :, 0] != TEXT).nonzero()[-count:, 0]
    if not len(own):
        own = torch.full((1,), view.tokens - 1, device=own.device)
    return torch.cat([own[:1].expand(count - len(own)), own])


def _scaled(queries: Tensor) -> Tensor:
    scaled: Tensor = queries.float() * queries.shape[1] ** -0.5
    return scaled


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
