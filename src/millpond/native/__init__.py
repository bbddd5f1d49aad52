"""The compiled inner loops of selection, compaction, re-anchoring and reading low bits, built on first use where there is a C++ compiler.

The `.cpp` files beside this one are compiled once into the user's cache folder. Where that is not possible (no compiler, another device, a
dtype without a kernel, or MILLPOND_NATIVE=0) the functions here return None or False and the caller's torch code runs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from millpond.native.build import compiled

__all__ = [
    "attention",
    "best",
    "check",
    "distances",
    "distinctiveness",
    "fold",
    "move_rows",
    "norms",
    "pool",
    "redundancy",
    "status",
    "turn",
    "unpack",
]

_KERNELS, _ATTENTION, _MERGING, _CODEC, _TURNING = (
    Path(__file__).with_name(f"{name}.cpp") for name in ("kernels", "attention", "merging", "codec", "turning")
)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _library(source: Path = _KERNELS) -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why not."""
    return compiled(source)


def status() -> str:
    """One line for people: where the library is, or why there is none."""
    return _library()[1]


def _ready(*tensors: Tensor, source: Path = _KERNELS) -> ctypes.CDLL | None:
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return _library(source)[0]


def _rows(tensor: Tensor) -> bool:
    """Whether the rows of a [..., D] tensor lie one behind the other."""
    return tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def norms(rows: Tensor) -> Tensor | None:
    """Euclidean norms of the last axis of [H, n, D]: float32 [H, n]."""
    library = _ready(rows)
    if library is None or rows.dtype not in _SUFFIX or not _rows(rows):
        return None
    heads, tokens, width = rows.shape
    out = torch.empty(heads, tokens, dtype=torch.float32)
    size = (ctypes.c_int64(rows.stride(0)), ctypes.c_int64(heads), ctypes.c_int64(tokens), ctypes.c_int64(width))
    getattr(library, f"millpond_norms_{_SUFFIX[rows.dtype]}")(_pointer(rows), *size, _pointer(out))
    return out


def redundancy(keys: Tensor, place: Tensor, recent: Tensor, floor: float, span: int, out: Tensor) -> bool:
    """Temporal redundancy of one head (`millpond.policies.infinipot_v`), in one pass over the keys.

    Args:
        keys: [n, D]. place: int16 [n, 2]. recent: bool [n]. floor: added to each norm. out: float32 [n], written.
        span: places that the table of mean unit keys holds at a time; bounds its size.

    Returns:
        False where there is no kernel; `out` is untouched then.
    """
    library = _ready(keys, place, recent, out)
    if library is None or keys.dtype not in _SUFFIX or not (_rows(keys) and _rows(place) and recent.is_contiguous()):
        return False
    tokens, width = keys.shape
    run = getattr(library, f"millpond_redundancy_{_SUFFIX[keys.dtype]}")
    table = torch.empty(span, width + 1, dtype=torch.float32)
    sizes = ctypes.c_int64(tokens), ctypes.c_int64(width), ctypes.c_float(floor)
    run(_pointer(keys), _pointer(place), _pointer(recent), *sizes, _pointer(table), ctypes.c_int64(span), _pointer(out))
    return True


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


def pool(values: Tensor, time_us: Tensor, place: Tensor, kernel: int) -> bool:
    """Pool one head's values over its frames' grids in place (`millpond.policies.pooling`).

    Args:
        values: float32 [n]. time_us: int64 [n]. place: int16 [n, 2]. kernel: odd window.

    Returns:
        False where there is no kernel; nothing has changed then.
    """
    library = _ready(values, time_us, place)
    if library is None or not (values.is_contiguous() and time_us.is_contiguous() and _rows(place)):
        return False
    sizes = ctypes.c_int64(len(values)), ctypes.c_int64(kernel)
    library.millpond_pool(_pointer(values), _pointer(time_us), _pointer(place), *sizes)
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


def move_rows(tensor: Tensor, keep: Tensor, done: ctypes.c_int64) -> bool:
    """Move the rows that `keep` names to the front of each head, in place.

    Args:
        tensor: [H, n, ...], rows contiguous. keep: int64 [H, S], ascending. done: heads that have moved, 0 at first; counted up here,
            and left out when it is run again.

    Returns:
        False where there is no kernel; nothing has moved then.
    """
    library = _ready(tensor, keep)
    row = tensor[0, 0].numel()
    if library is None or not keep.is_contiguous() or not tensor[0].is_contiguous():
        return False
    size = tensor.element_size()
    sizes = ctypes.c_int64(tensor.stride(0) * size), ctypes.c_int64(row * size)
    heads, slots = keep.shape
    counts = ctypes.c_int64(heads), ctypes.c_int64(slots)
    library.millpond_move_rows(_pointer(tensor), *sizes, _pointer(keep), *counts, ctypes.byref(done))
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
    tokens, width = keys.shape[-2:]
    if library is None or keys.dtype not in _SUFFIX or delta.dtype != torch.int64 or delta.shape[:-1] != (tokens,):
        return False
    if not (_rows(keys) and axis.is_contiguous() and inv_freq.is_contiguous()):
        return False
    try:
        heads = keys.view(-1, tokens, width)
    except RuntimeError:  # heads that do not lie at equal distances
        return False
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
    """Read packed keys or values (`millpond.cache.codec`), the same numbers as in torch.

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
