"""Folding tokens that are about to be forgotten into tokens that stay: weighted means of keys and values, in place and in chunks.

Knows neither why a token goes nor which one stays.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from millpond import native
from millpond.memory.resumable import Move, Pieces
from millpond.policies.base import Shape, View

__all__ = ["Fold", "change", "distances", "fold", "fold_scratch"]


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
    change(view, head, Fold(view.keys[head], view.values[head], owner, weight, view.chunk))


def change(view: View, head: int, how: Move) -> None:
    """Change one head's keys and values of the tokens that stay, so that an interrupted pass can go on: see `Policy.merge`.

    Args:
        how: run once or more often, until it is complete; it changes nothing any more then (`Steps` of assignments will do).
    """
    if view.change is not None:
        view.change(head, how)
    else:
        how.run()


class Fold:
    """One head's `fold`, which goes on where it stopped when it is run again after an interruption.

    Args:
        keys, values: [n, D], changed in place. owner, weight: as in `fold`. chunk: tokens worked on at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor, weight: Tensor, chunk: int) -> None:
        self._keys, self._values, self._owner, self._weight, self._chunk = keys, values, owner, weight, chunk
        self._done, self._pieces = ctypes.c_int64(0), Pieces()
        self._groups: tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]] | None = None

    def run(self) -> None:
        if native.fold(self._keys, self._values, self._owner, self._weight, self._done):
            return
        if self._groups is None:
            self._groups = self._group()
        self._pieces.run(2 * len(self._groups[3]), self._make, self._write)

    def _group(self) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
        """The tokens that go into others, int64 [m]; where they go, by number, int64 [m]; their weights, 0 for what does not count;
        and first and last of the tokens of each piece: whole groups, of at most a chunk where they are not larger themselves."""
        taking = (self._owner >= 0).nonzero()[:, 0]
        share = self._weight[taking]
        share.masked_fill_(~(share.isfinite() & (share > 0)), 0)
        for first in range(0, len(taking), self._chunk):
            rows = taking[first : first + self._chunk]
            sound = self._keys[rows].isfinite().all(1) & self._values[rows].isfinite().all(1)
            share[first : first + self._chunk].masked_fill_(~sound, 0)
        if not len(taking):
            return taking, taking, share, []
        _, group, counts = self._owner[taking].unique_consecutive(return_inverse=True, return_counts=True)
        pieces: list[tuple[int, int]] = []
        first = last = 0
        for count in counts.tolist():
            if last > first and last + count - first > self._chunk:
                pieces.append((first, last))
                first = last
            last += count
        return taking, group, share, [*pieces, (first, last)]

    def _make(self, index: int) -> tuple[Tensor, Tensor]:
        """Rows to be replaced, int64 [k], and by what, [k, D]."""
        assert self._groups is not None
        taking, group, share, pieces = self._groups
        tensor, (first, end) = self._part(index), pieces[index % len(pieces)]
        number = int(group[first])
        sums = torch.zeros(int(group[end - 1]) + 1 - number, tensor.shape[1], device=tensor.device)
        weights = torch.zeros(len(sums), device=tensor.device)
        for at in range(first, end, self._chunk):
            part = slice(at, min(at + self._chunk, end))
            which = group[part] - number
            sums.index_add_(0, which, tensor[taking[part]].float().nan_to_num_(0, 0, 0).mul_(share[part, None]))
            weights.index_add_(0, which, share[part])
        full = (weights > 0).nonzero()[:, 0]
        to = self._owner[taking[first:end]].unique_consecutive()[full]
        return to, sums[full].div_(weights[full, None]).to(tensor.dtype)

    def _write(self, index: int, to: Tensor, rows: Tensor) -> None:
        self._part(index)[to] = rows

    def _part(self, index: int) -> Tensor:
        """The keys' pieces come first, then the values'."""
        assert self._groups is not None
        return self._keys if index < len(self._groups[3]) else self._values


def fold_scratch(shape: Shape) -> int:
    """The most bytes that `fold` and `distances` allocate for a head, with owners, weights and masks."""
    return 4 * (5 * shape.chunk + 4) * (shape.head_dim + 4) + 6 * shape.of_head(torch.int64)
