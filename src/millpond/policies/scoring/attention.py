"""Attention of a few proxy queries over the whole memory: softmax(q k / sqrt(D)) over the prompt and the view.

The latest tokens' queries see what their model showed them: nothing newer than themselves. A proxy text's queries see all of the
memory and the prompt; the text's own keys, which a compaction never sees, do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millpond import ops
from millpond.errors import PolicyError
from millpond.policies.base import TEXT, Shape, View

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
            ops.add_attention(rows[part], prompt[head], view.keys[head], row, view.chunk, last)
        row /= rows.shape[0]
    return out


def attention_moments(view: View) -> tuple[Tensor, Tensor]:
    """Mean and variance over the latest tokens' queries of their attention on each token: float32 [H, n] each.

    Both are taken for each query head over its w rows (the variance unbiased; 0 for a single row), then averaged over the group.

    Raises:
        PolicyError: the view shows no queries.
    """
    queries, prompt = _proxy(view)
    mean, variance = torch.empty(2, view.heads, view.tokens, device=view.keys.device)
    for head in range(view.heads):
        rows = queries[head], prompt[head], view.keys[head], mean[head], variance[head]
        ops.attention_moments(*rows, view.chunk, _own(view, head))
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
    others = max(0, view.tokens - queries.shape[2])
    spreads = [
        ops.attention_spread(queries[head], prompt[head], view.keys[head], others, view.chunk, _own(view, head))
        for head in range(view.heads)
    ]
    return sum(entropy for entropy, _ in spreads), sum(variance for _, variance in spreads)


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
    """The most bytes that adding up a block's attention takes, for `View.accumulated_attention`."""
    # `chunk` of its queries at a time (or one token's group), rotated to their positions.
    rows = max(chunk, _WIDEST_GROUP)
    return attention_scratch(rows, head_dim, chunk) + rows * (16 + 30 * head_dim)


def _proxy(view: View) -> tuple[Tensor, Tensor]:
    if view.queries is None or view.prompt_keys is None or view.queries.shape[2] == 0:
        raise PolicyError("there are no proxy queries to score the memory by: only a Session shows them to a policy")
    return view.queries, view.prompt_keys


def _own(view: View, head: int) -> Tensor:
    """Where the latest tokens, whose queries are shown, lie among a head's: int64 [w].

    Remembered turns came behind them and asked nothing. Of those that are gone already, that of the oldest that is left.
    """
    assert view.queries is not None
    count = view.queries.shape[2]
    own = (view.grid_position[head, :, 0] != TEXT).nonzero()[-count:, 0]
    if not len(own):
        own = torch.full((1,), view.tokens - 1, device=own.device)
    return torch.cat([own[:1].expand(count - len(own)), own])
