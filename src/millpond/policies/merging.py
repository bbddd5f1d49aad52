"""Folding tokens that are about to be forgotten into tokens that stay: weighted means of keys and values, in place and in chunks.

Knows neither why a token goes nor which one stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millpond import native
from millpond.policies.base import View

__all__ = ["distances", "fold", "fold_scratch"]


def distances(keys: Tensor, owner: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """How far each key [n, D] lies from its owner's, and the cosine of the two: float32 [n] each; `chunk` keys at a time.

    Args:
        owner: int64 [n], the token that each one goes into; -1 for none, where both are 0.
    """
    apart, alike = torch.zeros(2, keys.shape[0], device=keys.device)
    if native.distances(keys, owner, apart, alike):
        return apart, alike
    for first in range(0, keys.shape[0], chunk):
        to = owner[first : first + chunk]
        own, other = keys[first : first + chunk].float(), keys[to.clamp_min(0)].float()
        lengths = own.norm(dim=1) * other.norm(dim=1)
        alike[first : first + chunk] = (own * other).sum(1) / lengths.clamp_min_(1e-12)
        apart[first : first + chunk] = (own - other).norm(dim=1)
    nobody = owner < 0
    return apart.masked_fill_(nobody, 0), alike.masked_fill_(nobody, 0)


def fold(view: View, head: int, owner: Tensor, weight: Tensor) -> None:
    """Replace keys and values of some tokens by the weighted means of all tokens that go into them; in float32 sums.

    Args:
        owner: int64 [n], the token that each one goes into (itself, for one that takes others in); -1 for one that is left alone.
            Ascending where it is not -1.
        weight: float32 [n]. A token whose key, value or weight is not a finite number counts for nothing; where nothing counts,
            nothing changes.
    """
    if native.fold(view.keys[head], view.values[head], owner, weight):
        return
    taking = (owner >= 0).nonzero()[:, 0]
    if not len(taking):
        return
    targets, group = owner[taking].unique_consecutive(return_inverse=True)
    keys, values = view.keys[head], view.values[head]
    finite = weight[taking].isfinite() & (weight[taking] > 0)
    for first in range(0, len(taking), view.chunk):
        rows = taking[first : first + view.chunk]
        sound = keys[rows].isfinite().all(1) & values[rows].isfinite().all(1)
        finite[first : first + view.chunk] &= sound
    for tensor in (keys, values):
        carried, carried_weight, carried_group = torch.zeros(tensor.shape[1], device=keys.device), 0.0, -1
        for first in range(0, len(taking), view.chunk):
            part = slice(first, first + view.chunk)
            rows, which = taking[part], group[part] - group[first]
            share = weight[rows].masked_fill(~finite[part], 0)
            count = int(which[-1]) + 1
            sums = torch.zeros(count, tensor.shape[1], device=keys.device)
            weights = torch.zeros(count, device=keys.device)
            sums.index_add_(0, which, tensor[rows].float().nan_to_num_(0, 0, 0) * share[:, None])
            weights.index_add_(0, which, share)
            if carried_group == int(group[first]):
                sums[0] += carried
                weights[0] += carried_weight
            # The last group of a chunk may go on in the next one; all others are whole.
            last = first + view.chunk >= len(taking)
            done = count if last or group[first + view.chunk] != group[first + len(rows) - 1] else count - 1
            full = (weights[:done] > 0).nonzero()[:, 0]
            tensor[targets[int(group[first]) + full]] = (sums[full] / weights[full, None]).to(tensor.dtype)
            if done < count:
                carried, carried_weight = sums[-1].clone(), float(weights[-1])
                carried_group = int(group[first]) + count - 1


def fold_scratch(tokens: int, head_dim: int, chunk: int) -> int:
    """The most bytes that `fold` and `distances` allocate for a head of `tokens`, with owners, weights and masks."""
    return 4 * (5 * chunk + 4) * (head_dim + 4) + 48 * tokens
