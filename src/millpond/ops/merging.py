"""Weighted means of runs of one head's tokens, in place, and how far keys lie from those that they go into."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from millpond.memory.resumable import Progress
from millpond.ops.c_functions import CFunction, contiguous, contiguous_rows
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_FOLD = CFunction("merging.cpp", "fold", "ppnnppp", by_dtype=True)
_C_DISTANCES = CFunction("merging.cpp", "distances", "pnnppp", by_dtype=True)


@operation
def distances(keys: Tensor, owner: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """How far each key [n, D] lies from its owner's, and the cosine of the two: float32 [n] each; `chunk` keys at a time.

    Args:
        owner: int64 [n], the token that each one goes into; -1 for none, where both are 0.
    """
    apart, alike = torch.zeros(2, keys.shape[0], device=keys.device)
    for first in range(0, keys.shape[0], chunk):
        to = owner[first : first + chunk]
        own, other = keys[first : first + chunk].float(), keys[to.clamp_min(0)].float()
        lengths = own.norm(dim=1) * other.norm(dim=1)
        alike[first : first + chunk] = (own * other).sum(1) / lengths.clamp_min_(1e-12)
        apart[first : first + chunk] = (own - other).norm(dim=1)
    nobody = owner < 0
    return apart.masked_fill_(nobody, 0), alike.masked_fill_(nobody, 0)


@distances.kernel("cpu")
def _distances(keys: Tensor, owner: Tensor, chunk: int) -> tuple[Tensor, Tensor] | Declined:
    run = _C_DISTANCES.of(keys.dtype)
    if run is None or not (contiguous_rows(keys) and contiguous(owner)):
        return DECLINED
    apart, alike = torch.empty(2, keys.shape[0])
    run(keys.data_ptr(), *keys.shape, owner.data_ptr(), apart.data_ptr(), alike.data_ptr())
    return apart, alike


@operation
def fold(keys: Tensor, values: Tensor, owner: Tensor, weight: Tensor, chunk: int, progress: Progress) -> None:
    """Replace keys and values of some of one head's tokens by the weighted means of all tokens that go into them; in float32 sums.

    Args:
        keys, values: [n, D], changed in place.
        owner: int64 [n], the token that each one goes into (itself, for one that takes others in); -1 for one that is left alone.
            Ascending where it is not -1.
        weight: float32 [n]. A token whose key, value or weight is not a finite number counts for nothing; where nothing counts,
            nothing changes.
        chunk: tokens worked on at a time where there is no kernel.
        progress: goes on from there; what is done does not change again.
    """
    taking, group, share, pieces = progress.once(lambda: _groups(keys, values, owner, weight, chunk))

    def part(index: int) -> Tensor:
        """The keys' pieces come first, then the values'."""
        return keys if index < len(pieces) else values

    def make(index: int) -> tuple[Tensor, Tensor]:
        """Rows to be replaced, int64 [k], and by what, [k, D]."""
        tensor, (first, end) = part(index), pieces[index % len(pieces)]
        number = int(group[first])
        sums = torch.zeros(int(group[end - 1]) + 1 - number, tensor.shape[1], device=tensor.device)
        weights = torch.zeros(len(sums), device=tensor.device)
        for at in range(first, end, chunk):
            some = slice(at, min(at + chunk, end))
            which = group[some] - number
            sums.index_add_(0, which, tensor[taking[some]].float().nan_to_num_(0, 0, 0).mul_(share[some, None]))
            weights.index_add_(0, which, share[some])
        full = (weights > 0).nonzero()[:, 0]
        to = owner[taking[first:end]].unique_consecutive()[full]
        return to, sums[full].div_(weights[full, None]).to(tensor.dtype)

    def write(index: int, to: Tensor, rows: Tensor) -> None:
        part(index)[to] = rows

    progress.pieces.run(2 * len(pieces), make, write)


def _groups(
    keys: Tensor, values: Tensor, owner: Tensor, weight: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """The tokens that go into others, int64 [m]; where they go, by number, int64 [m]; their weights, 0 for what does not count;
    and first and last of the tokens of each piece: whole groups, of at most a chunk where they are not larger themselves."""
    taking = (owner >= 0).nonzero()[:, 0]
    share = weight[taking]
    share.masked_fill_(~(share.isfinite() & (share > 0)), 0)
    for first in range(0, len(taking), chunk):
        rows = taking[first : first + chunk]
        sound = keys[rows].isfinite().all(1) & values[rows].isfinite().all(1)
        share[first : first + chunk].masked_fill_(~sound, 0)
    if not len(taking):
        return taking, taking, share, []
    _, group, counts = owner[taking].unique_consecutive(return_inverse=True, return_counts=True)
    pieces: list[tuple[int, int]] = []
    first = last = 0
    for count in counts.tolist():
        if last > first and last + count - first > chunk:
            pieces.append((first, last))
            first = last
        last += count
    return taking, group, share, [*pieces, (first, last)]


@fold.kernel("cpu")
def _fold(
    keys: Tensor, values: Tensor, owner: Tensor, weight: Tensor, chunk: int, progress: Progress
) -> Declined | None:
    run = _C_FOLD.of(keys.dtype)
    if run is None or values.dtype != keys.dtype or not (contiguous_rows(keys, values) and contiguous(owner, weight)):
        return DECLINED
    arrays = keys.data_ptr(), values.data_ptr(), *keys.shape, owner.data_ptr(), weight.data_ptr()
    run(*arrays, ctypes.byref(progress.count))
    return None
