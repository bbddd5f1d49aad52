"""Folding tokens that are about to be forgotten into tokens that stay: weighted means of keys and values, in place and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from millpond import ops
from millpond.memory.resumable import InPlace, Move
from millpond.policies.base import Shape, View


def fold(view: View, head: int, owner: Tensor, weight: Tensor) -> None:
    """Replace keys and values of some tokens by the weighted means of all tokens that go into them; in float32 sums.

    Args:
        owner: int64 [n], the token that each one goes into (itself, for one that takes others in); -1 for one that is left alone.
            Ascending where it is not -1.
        weight: float32 [n]. A token whose key, value or weight is not a finite number counts for nothing; where nothing counts,
            nothing changes.
    """
    change(view, head, InPlace(ops.fold, view.keys[head], view.values[head], owner, weight, view.chunk))


def change(view: View, head: int, how: Move) -> None:
    """Change one head's keys and values of the tokens that stay, so that an interrupted pass can go on: see `Policy.merge`.

    Args:
        how: run once or more often, until it is complete; it changes nothing any more then (`Steps` of assignments will do).
    """
    if view.change is not None:
        view.change(head, how)
    else:
        how.run()


def fold_scratch(shape: Shape) -> int:
    """The most bytes that `fold` and `ops.distances` allocate for a head, with owners, weights and masks."""
    return 4 * (5 * shape.chunk + 4) * (shape.head_dim + 4) + 6 * shape.of_head(torch.int64)
