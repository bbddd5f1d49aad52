"""The compiled inner loops of selection, compaction, re-anchoring and reading low bits, built on first use where there is a C++ compiler.

The `.cpp` files beside this one are compiled once into the user's cache folder. Where that is not possible (no compiler, another device, a
dtype without a kernel, or MILLPOND_NATIVE=0) the functions here return None or False and the caller's torch code runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millpond.native.build import compiled

if TYPE_CHECKING:
    from millpond.policies.base import View

__all__ = [
    "attention",
    "best",
    "check",
    "distances",
    "distinctiveness",
    "fold",
    "infinipot_v",
    "move_rows",
    "status",
    "turn",
    "unpack",
]

_KERNELS, _INFINIPOT_V, _ATTENTION, _MERGING, _CODEC, _TURNING = (
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("kernels", "infinipot_v", "attention", "merging", "codec", "turning")
)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _library(source: Path = _KERNELS) -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why not."""
    return compiled(source)


def status() -> str:
    """One line for people: where the library is, or why there is none."""
    return _library()[1]


def _ready(*tensors: Tensor, source: Path = _KERNELS) -> ctypes.CDLL | None:
    for tensor in tensors:  # no generator: at a small model's shapes it would cost as much as what follows
        if not tensor.is_cpu:
            return None
    return _library(source)[0]


def _rows(tensor: Tensor) -> bool:
    """Whether the rows of a [..., D] tensor lie one behind the other."""
    return tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def infinipot_v(
    view: View, by_redundancy: int, slots: int, kernel: int, thresholds: tuple[float, float, float], floor: float
) -> Tensor | None:
    """The selection of one layer (`millpond.policies.infinipot_v`), with all its heads in one call.

    Args:
        by_redundancy: tokens of each head for the recent frames and TaR. slots: of all that stay.
        kernel: of the pooling; 0 where the value norms choose it by `thresholds`. floor: added to each key's norm.

    Returns:
        int64 [H, slots], ascending; None where there is no kernel.
    """
    keys, values, time_us, grid_position, recent = (
        view.keys,
        view.values,
        view.time_us,
        view.grid_position,
        view.protected,
    )
    library = _ready(keys, values, time_us, grid_position, recent, source=_INFINIPOT_V)
    heads, tokens, head_dim = keys.shape
    if library is None or keys.dtype not in _SUFFIX or values.dtype != keys.dtype or not 0 < slots <= tokens:
        return None
    whole = time_us.stride(1) == 1 and recent.is_contiguous()
    if not (whole and _rows(keys) and _rows(values) and _rows(grid_position)):
        return None
    span = max(1, view.block, view.chunk)
    keep = torch.empty(heads, slots, dtype=torch.int64)
    scores, work = torch.empty(heads, tokens), torch.empty(2 * tokens, dtype=torch.int32)
    table, marked = torch.empty(span, head_dim + 1), torch.empty(heads, tokens, dtype=torch.bool)
    strides = (each.stride(0) for each in (keys, values, time_us, grid_position))
    getattr(library, f"millpond_infinipot_v_{_SUFFIX[keys.dtype]}")(
        *(_pointer(each) for each in (keys, values, time_us, grid_position, recent)),
        *(ctypes.c_int64(each) for each in (heads, tokens, head_dim, *strides, by_redundancy, slots, kernel)),
        (ctypes.c_float * 3)(*thresholds),
        ctypes.c_float(floor),
        ctypes.c_int64(span),
        *(_pointer(each) for each in (scores, table, work, marked, keep)),
    )
    return keep


def distinctiveness(keys: Tensor, out: Tensor) -> bool:
    """Minus the cosine of each of one head's keys with their mean unit key (`millpond.policies.keydiff`).

    Args:
        keys: [n, D]. out: float32 [n], written.

    Returns:
        False where there is no kernel; `out` is untouched then.
    """
    library = _ready(keys, out)
    if library is None or keys.dtype not in _SUFFIX or not (_rows(keys) and out.is_contiguous()):
        return False
    run = getattr(library, f"millpond_distinctiveness_{_SUFFIX[keys.dtype]}")
    run(_pointer(keys), ctypes.c_int64(keys.shape[0]), ctypes.c_int64(keys.shape[1]), _pointer(out))
    return True


def attention(
    scaled: Tensor,
    prompt: Tensor,
    keys: Tensor,
    *,
    last: Tensor | None = None,
    sums: Tensor | None = None,
    variances: Tensor | None = None,
    counted: int | None = None,
) -> tuple[float, float] | None:
    """Attention of a few queries on one head's keys, summed up per key (`millpond.policies.attention`).

    Args:
        scaled: float32 [r, D], queries divided by sqrt(D). prompt: [P, D], keys that share the softmax. keys: [n, D].
        last: int64 [r], the last key that each query sees; None for all.
        sums, variances: float32 [n]; the sum and the unbiased variance over the queries are added.
        counted: how many of the first keys the results are about; None for all.

    Returns:
        -sum p log p over queries and counted keys, and the sum of the variances; None where there is no kernel, and nothing has
        changed then.
    """
    given = [one for one in (last, sums, variances) if one is not None]
    library = _ready(scaled, prompt, keys, *given, source=_ATTENTION)
    if library is None or keys.dtype not in _SUFFIX or prompt.dtype != keys.dtype:
        return None
    if not (_rows(keys) and _rows(prompt) and all(one.is_contiguous() for one in (scaled, *given))):
        return None
    totals = (ctypes.c_double * 2)()
    getattr(library, f"millpond_columns_{_SUFFIX[keys.dtype]}")(
        _pointer(scaled),
        ctypes.c_int64(scaled.shape[0]),
        ctypes.c_int64(scaled.shape[1]),
        _pointer(prompt),
        ctypes.c_int64(prompt.shape[0]),
        _pointer(keys),
        ctypes.c_int64(keys.shape[0]),
        None if last is None else _pointer(last),
        ctypes.c_int64(keys.shape[0] if counted is None else counted),
        None if sums is None else _pointer(sums),
        None if variances is None else _pointer(variances),
        # Entropies cost a product a probability: only where nothing else was asked for.
        totals if sums is None and variances is None else None,
    )
    return totals[0], totals[1]


def fold(keys: Tensor, values: Tensor, owner: Tensor, weight: Tensor, done: ctypes.c_int64) -> bool:
    """Weighted means of runs of one head's tokens, in place (`millpond.policies.merging.fold`).

    `done` is 0 before and 1 afterwards; where it is 1, nothing changes any more.

    Returns:
        False where there is no kernel; nothing has changed then.
    """
    library = _ready(keys, values, owner, weight, source=_MERGING)
    if (
        library is None
        or keys.dtype not in _SUFFIX
        or values.dtype != keys.dtype
        or not (_rows(keys) and _rows(values))
    ):
        return False
    if not (owner.is_contiguous() and weight.is_contiguous()):
        return False
    sizes = ctypes.c_int64(keys.shape[0]), ctypes.c_int64(keys.shape[1])
    run = getattr(library, f"millpond_fold_{_SUFFIX[keys.dtype]}")
    run(_pointer(keys), _pointer(values), *sizes, _pointer(owner), _pointer(weight), ctypes.byref(done))
    return True


def distances(keys: Tensor, owner: Tensor, apart: Tensor, alike: Tensor) -> bool:
    """How far one head's keys lie from their owners' (`millpond.policies.merging.distances`), written to `apart` and `alike`.

    Returns:
        False where there is no kernel; nothing is written then.
    """
    library = _ready(keys, owner, apart, alike, source=_MERGING)
    if library is None or keys.dtype not in _SUFFIX or not (_rows(keys) and owner.is_contiguous()):
        return False
    sizes = ctypes.c_int64(keys.shape[0]), ctypes.c_int64(keys.shape[1])
    run = getattr(library, f"millpond_distances_{_SUFFIX[keys.dtype]}")
    run(_pointer(keys), *sizes, _pointer(owner), _pointer(apart), _pointer(alike))
    return True


def best(scores: Tensor, slots: int) -> Tensor | None:
    """Indices of the `slots` largest scores in each row, ascending: float32 [H, n] -> int64 [H, slots]."""
    library = _ready(scores)
    heads, tokens = scores.shape
    if library is None or scores.dtype != torch.float32 or not scores.is_contiguous() or not 0 < slots <= tokens:
        return None
    keep = torch.empty(heads, slots, dtype=torch.int64)
    work = torch.empty(2 * tokens, dtype=torch.int32)
    sizes = ctypes.c_int64(heads), ctypes.c_int64(tokens), ctypes.c_int64(slots)
    library.millpond_best(_pointer(scores), *sizes, _pointer(work), _pointer(keep))
    return keep


def check(keep: Tensor, protected: Tensor) -> int | None:
    """Whether a selection can be carried out: 0 yes, 1 not ascending or out of range, 2 a protected token is missing.

    Args:
        keep: int64 [H, S]. protected: bool [H, n].
    """
    library = _ready(keep, protected)
    if library is None or not (keep.is_contiguous() and protected.is_contiguous()):
        return None
    (heads, slots), tokens = keep.shape, protected.shape[1]
    sizes = ctypes.c_int64(heads), ctypes.c_int64(tokens), ctypes.c_int64(slots)
    library.millpond_check.restype = ctypes.c_int64
    return int(library.millpond_check(_pointer(keep), _pointer(protected), *sizes))


def move_rows(tensors: Sequence[Tensor], keep: Tensor, done: ctypes.c_int64) -> bool:
    """Move the rows that `keep` names to the front of each head, in place, in every one of the tensors.

    Args:
        tensors: [H, n, ...] each, rows contiguous. keep: int64 [H, S], ascending. done: heads that have moved, 0 at first; counted up
            here, and left out when it is run again.

    Returns:
        False where there is no kernel; nothing has moved then.
    """
    library = _ready(*tensors, keep)
    if library is None or not keep.is_contiguous():
        return False
    layout: list[int] = []
    for tensor in tensors:
        size, shape, strides = tensor.element_size(), tensor.shape, tensor.stride()
        row = prod(shape[2:])
        if strides[1] != row or not _packed(shape[2:], strides[2:]):
            return False
        layout += (tensor.data_ptr(), strides[0] * size, row * size)
    heads, slots = keep.shape
    library.millpond_move_rows(
        (ctypes.c_int64 * len(layout))(*layout),
        ctypes.c_int64(len(tensors)),
        _pointer(keep),
        ctypes.c_int64(heads),
        ctypes.c_int64(slots),
        ctypes.byref(done),
    )
    return True


def _packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of one row lie one behind the other."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def turn(keys: Tensor, delta: Tensor, axis: Tensor, inv_freq: Tensor, done: ctypes.c_int64 | None = None) -> bool:
    """Turn keys by `delta` positions in place (`millpond.positions.Rope.rotate_`).

    Args:
        keys: [..., n, D]. delta: int64 [n, axes], any strides. axis: int64 [D/2]. inv_freq: float32 [D/2].
        done: 0 before and 1 afterwards, where it is given; where it is 1, nothing turns any more.

    Returns:
        False where there is no kernel; nothing has turned then.
    """
    library = _ready(keys, delta, axis, inv_freq, source=_TURNING)
    tokens, head_dim = keys.shape[-2:]
    if library is None or keys.dtype not in _SUFFIX or delta.dtype != torch.int64 or delta.shape[:-1] != (tokens,):
        return False
    if not (_rows(keys) and axis.is_contiguous() and inv_freq.is_contiguous()):
        return False
    shape, strides = keys.shape[:-2], keys.stride()[:-2]
    if any(shape[at] != 1 and strides[at] != shape[at + 1] * strides[at + 1] for at in range(len(shape) - 1)):
        return False  # heads that do not lie at equal distances
    heads = keys.view(prod(shape), tokens, head_dim)
    getattr(library, f"millpond_turn_{_SUFFIX[keys.dtype]}")(
        _pointer(keys),
        *(ctypes.c_int64(each) for each in (heads.stride(0), *heads.shape)),
        _pointer(delta),
        *(ctypes.c_int64(each) for each in (*delta.stride(), delta.shape[1])),
        _pointer(axis),
        _pointer(inv_freq),
        ctypes.c_int64(len(inv_freq)),
        None if done is None else ctypes.byref(done),
    )
    return True


def unpack(codes: Tensor, scales: Tensor, bits: int, by_channel: bool, out: Tensor) -> bool:
    """Read packed keys or values (`millpond.cache.kv_quantizer`), the same numbers as in torch.

    Args:
        codes: uint8 [m, G, R]. scales: float16 [m, 2, D] for keys (`by_channel`), [m, G, 2, C] for values. out: [m * G, D], written.

    Returns:
        False where there is no kernel; `out` is untouched then.
    """
    library = _ready(codes, scales, out, source=_CODEC)
    whole = codes.is_contiguous() and scales.is_contiguous() and out.is_contiguous()
    if library is None or out.dtype not in _SUFFIX or not whole:
        return False
    groups, size, row = codes.shape
    sizes = (ctypes.c_int64(each) for each in (bits, by_channel, groups, size, row, out.shape[1]))
    getattr(library, f"millpond_unpack_{_SUFFIX[out.dtype]}")(_pointer(codes), _pointer(scales), *sizes, _pointer(out))
    return True
