"""What a compaction does with a selection: checks it, and moves what stays to the front."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from millpond.memory.resumable import Progress
from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_CHECK = CFunction("compaction.cpp", "check_selection", "ppnnn", "n")
_C_MOVE = CFunction("compaction.cpp", "move_rows", "pnpnnp")


@operation
def check_selection(keep: Tensor, protected: Tensor) -> int:
    """Whether a selection can be carried out: 0 yes, 1 not ascending or out of range, 2 a protected token is missing.

    Args:
        keep: int64 [H, S]. protected: bool [H, n].
    """
    inside = bool((keep[:, 0] >= 0).all()) and bool((keep[:, -1] < protected.shape[1]).all())
    if not inside or not bool((keep[:, 1:] > keep[:, :-1]).all()):
        return 1
    kept = protected.gather(1, keep).sum(dim=1)
    return 0 if bool((kept == protected.sum(dim=1)).all()) else 2


@check_selection.kernel("cpu")
def _check_selection(keep: Tensor, protected: Tensor) -> int | Declined:
    run = _C_CHECK.of()
    if run is None or not contiguous(keep, protected):
        return DECLINED
    heads, slots = keep.shape
    found: int = run(keep.data_ptr(), protected.data_ptr(), heads, protected.shape[1], slots)
    return found


@operation
def move_rows(keep: Tensor, tensors: Sequence[Tensor], chunk: int, progress: Progress) -> None:
    """Move the rows that `keep` names to the front of each head, in place, in several tensors alike.

    Because `keep` ascends, survivor j comes from row >= j: moving chunks in ascending order never overwrites a survivor that is
    still to be moved, so the scratch is one chunk of one head.

    Args:
        keep: int64 [H, S], ascending. tensors: [H, n, ...] each. chunk: rows moved at a time where there is no kernel.
        progress: goes on from there.
    """
    kept = keep.shape[1]
    if not kept:
        return
    chunks = -(-kept // chunk)
    each = chunks * len(keep)

    def piece(index: int) -> tuple[Tensor, int, int]:
        """The tensor's head [n, ...] that a piece lies in, the head's number and the piece's first row."""
        head, at = divmod(index % each, chunks)
        return tensors[index // each][head], head, at * chunk

    def make(index: int) -> tuple[Tensor | None]:
        rows, head, first = piece(index)
        part = keep[head, first : first + chunk]
        if int(part[-1]) == first + len(part) - 1:  # the head is unmoved up to here: keep[j] == j
            return (None,)
        return (rows.index_select(0, part),)

    def write(index: int, moved: Tensor | None) -> None:
        rows, _, first = piece(index)
        if moved is not None:
            rows[first : first + len(moved)] = moved

    progress.pieces.run(each * len(tensors), make, write)


@move_rows.kernel("cpu")
def _move_rows(keep: Tensor, tensors: Sequence[Tensor], chunk: int, progress: Progress) -> Declined | None:
    run = _C_MOVE.of()
    if run is None or not keep.is_contiguous():
        return DECLINED
    layout: list[int] = []
    for tensor in tensors:
        size, shape, strides, row = tensor.element_size(), tensor.shape, tensor.stride(), 1
        for axis in range(len(shape) - 1, 1, -1):  # the elements of a row, one behind the other
            if strides[axis] != row and shape[axis] != 1:
                return DECLINED
            row *= shape[axis]
        if strides[1] != row or not tensor.is_cpu:
            return DECLINED
        layout += (tensor.data_ptr(), strides[0] * size, row * size)
    heads, slots = keep.shape
    # Heads that have moved are counted in there, so that no interruption comes between.
    addresses = (ctypes.c_int64 * len(layout))(*layout)
    run(addresses, len(tensors), keep.data_ptr(), heads, slots, ctypes.byref(progress.count))
    return None
