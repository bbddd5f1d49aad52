"""The selection of InfiniPot-V in one layer: redundancy of keys, norms of values, their pooling, and both rankings.

One operation, because at a small model's shapes a call costs more than its loops.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from millpond.ops.c_functions import CFunction, contiguous, contiguous_rows
from millpond.ops.dispatch import DECLINED, Declined, operation
from millpond.ops.ranking import best_and_protected

_C_INFINIPOT_V = CFunction("infinipot_v.cpp", "infinipot_v", "pppppnnnnnnnnnnpfnppppp", by_dtype=True)
_NORM_FLOOR = 1e-9


@operation
def infinipot_v_selection(
    keys: Tensor, values: Tensor, time_us: Tensor, grid_position: Tensor, protected: Tensor, *, by_redundancy: int, slots: int,
    thresholds: tuple[float, float, float], pooling: int | None, chunk: int, span: int,
) -> Tensor:  # fmt: skip
    """The protected tokens, those with the most distinct keys among the others, and of what is left those with the largest values.

    Args:
        keys, values: [H, n, D]. time_us: int64 [H, n]. grid_position: int16 [H, n, 2]. protected: bool [H, n], the latest frames. As in `View`.
        by_redundancy: tokens of each head that are protected or chosen by redundancy. slots: of all that stay.
        thresholds, pooling: the value norms are pooled by `pooling_kernel` of the thresholds, or by this odd kernel.
        chunk: tokens worked on at a time where there is no kernel. span: grid positions worked on at a time.

    Returns:
        int64 [H, slots], ascending.
    """
    marked = protected.clone()
    if by_redundancy > int(marked[0].sum()):
        scores = temporal_redundancy(keys, grid_position, marked, chunk, span)
        marked.scatter_(1, best_and_protected(scores, marked, by_redundancy), True)
        # A head with too few tokens on the grid was filled up with text, which does not compete here.
        marked &= scores > -torch.inf
        del scores
    norms = value_norms(values, chunk)
    kernel = pooling_kernel(norms, thresholds) if pooling is None else pooling
    if kernel > 1:
        pool_over_grid(norms, time_us, grid_position, kernel, chunk)
    return best_and_protected(norms, marked, slots)


@infinipot_v_selection.kernel("cpu")
def _infinipot_v_selection(
    keys: Tensor, values: Tensor, time_us: Tensor, grid_position: Tensor, protected: Tensor, *, by_redundancy: int, slots: int,
    thresholds: tuple[float, float, float], pooling: int | None, chunk: int, span: int,
) -> Tensor | Declined:  # fmt: skip
    run = _C_INFINIPOT_V.of(keys.dtype)
    heads, tokens, head_dim = keys.shape
    if run is None or values.dtype != keys.dtype or not 0 < slots <= tokens:
        return DECLINED
    rows = contiguous_rows(keys, values, grid_position) and time_us.is_cpu and time_us.stride(1) == 1
    if not (rows and contiguous(protected)):
        return DECLINED
    keep = torch.empty(heads, slots, dtype=torch.int64)
    scores, work = torch.empty(heads, tokens), torch.empty(2 * tokens, dtype=torch.int32)
    table, marked = torch.empty(span, head_dim + 1), torch.empty(heads, tokens, dtype=torch.bool)
    run(
        *(each.data_ptr() for each in (keys, values, time_us, grid_position, protected)),
        *(heads, tokens, head_dim),
        *(each.stride(0) for each in (keys, values, time_us, grid_position)),
        *(by_redundancy, slots, pooling or 0, (ctypes.c_float * 3)(*thresholds), _NORM_FLOOR, span),
        *(each.data_ptr() for each in (scores, table, work, marked, keep)),
    )
    return keep


def pooling_kernel(norms: Tensor, thresholds: tuple[float, float, float]) -> int:
    """7, 5 or 3 where the coefficient of variation of a layer's value norms, float32 [H, n], is below the first, second or third
    threshold; else 1, which is no pooling."""
    mean = float(norms.mean())
    variance = float(torch.linalg.vector_norm(norms)) ** 2 / norms.numel() - mean**2
    cv = max(0.0, variance) ** 0.5 / max(mean, 1e-12)
    return next((size for size, above in zip((7, 5, 3), thresholds, strict=True) if cv < above), 1)


def value_norms(values: Tensor, chunk: int) -> Tensor:
    """||V|| of every token, [H, n, D]: float32 [H, n]; `chunk` tokens at a time."""
    norms = torch.empty(values.shape[:2], dtype=torch.float32, device=values.device)
    for rows, row in zip(values, norms, strict=True):
        for part, out in zip(rows.split(chunk), row.split(chunk), strict=True):
            out.copy_(torch.linalg.vector_norm(part.float(), dim=-1))
    return norms


def temporal_redundancy(keys: Tensor, grid_position: Tensor, protected: Tensor, chunk: int, span: int) -> Tensor:
    """TaR of every token: float32 [H, n]; -inf for protected tokens and those on no grid.

    The mean over r frames of cos(k, k') at one grid position is (k / ||k||) . mean(k' / ||k'||): one dot product a token, and a
    table of one vector a grid position instead of an r x f x p x D intermediate. One round of `span` positions does unless the recent
    frames differ in size and no table of one frame's positions covers them.

    Args:
        keys: [H, n, D]. grid_position: int16 [H, n, 2]. protected: bool [H, n]. chunk: tokens at a time.
    """
    scores = torch.empty(protected.shape, dtype=torch.float32, device=keys.device)
    for head in range(len(keys)):
        _redundancy_of(keys[head], grid_position[head], protected[head], chunk, span, scores[head])
    return scores


def _redundancy_of(keys: Tensor, grid_position: Tensor, recent: Tensor, chunk: int, span: int, out: Tensor) -> None:
    """Of one head; `span` grid positions at a time."""
    visual = grid_position[:, 0] >= 0
    latest = (recent & visual).nonzero()[:, 0]
    height, width = (grid_position.index_select(0, latest).amax(dim=0) + 1).tolist() if len(latest) else (0, 0)
    outside = ~visual | (grid_position[:, 0] >= height) | (grid_position[:, 1] >= width)
    index = (grid_position[:, 0].to(torch.int32) * width).add_(grid_position[:, 1]).masked_fill_(outside, -1)
    out.zero_()
    for base in range(0, height * width, span):
        table, seen = _mean_unit_keys(keys, latest, index, base, span, chunk)
        for first in range(0, len(keys), chunk):
            at = index[first : first + chunk] - base
            shown = (at >= 0) & (at < span)
            at.masked_fill_(~shown, 0)
            shown &= seen.index_select(0, at) > 0
            rows = keys[first : first + chunk].float()
            dots = torch.linalg.vecdot(rows, table.index_select(0, at))
            dots /= torch.linalg.vector_norm(rows, dim=-1) + _NORM_FLOOR
            part = out[first : first + chunk]
            part.copy_(torch.where(shown, dots.neg_(), part))
    out.masked_fill_(~visual | recent, -torch.inf)


def _mean_unit_keys(
    keys: Tensor, latest: Tensor, index: Tensor, base: int, span: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The mean unit key of the grid positions base... over the recent frames, float32 [span, D], and how many show each, [span]."""
    table = torch.zeros(span, keys.shape[1], dtype=torch.float32, device=keys.device)
    seen = torch.zeros(span, dtype=torch.float32, device=keys.device)
    for first in range(0, len(latest), chunk):
        part = latest[first : first + chunk]
        at = index.index_select(0, part) - base
        inside = (at >= 0) & (at < span)
        part, at = part[inside], at[inside]
        rows = keys.index_select(0, part).float()
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + _NORM_FLOOR
        table.index_add_(0, at, rows)
        seen.index_add_(0, at, torch.ones(len(at), device=keys.device))
    table /= seen.clamp(min=1)[:, None]
    return table, seen


def pool_over_grid(values: Tensor, time_us: Tensor, grid_position: Tensor, kernel: int, chunk: int) -> None:
    """Replace each visual token's value by the mean over the tokens of its frame in a kernel x kernel window, in place.

    Only tokens that exist count: neither the padding at a frame's border nor the holes of earlier passes. Tokens on no grid
    keep their value. Works on as many frames at a time as fit into `chunk` grid cells, because after many
    passes few tokens spread over many frames.

    Args:
        values: float32 [H, n]. time_us: int64 [H, n], one a frame. grid_position: int16 [H, n, 2].
        kernel: odd window size.
    """
    for head in range(len(values)):
        visual = (grid_position[head, :, 0] >= 0).nonzero()[:, 0]
        if not len(visual):
            continue
        times = time_us[head].index_select(0, visual)
        frame = torch.zeros(len(visual), dtype=torch.int32, device=visual.device)
        torch.cumsum(times[1:] != times[:-1], 0, out=frame[1:])
        del times
        rows, cols = (grid_position[head].amax(dim=0) + 1).tolist()
        cells = rows * cols
        at_once = max(1, chunk // cells)
        for first in range(0, int(frame[-1]) + 1, at_once):
            ends = torch.tensor([first, first + at_once], dtype=torch.int32, device=frame.device)
            low, high = torch.searchsorted(frame, ends).tolist()
            part = visual[low:high]
            cell = grid_position[head].index_select(0, part)
            at = ((frame[low:high] - first) * cells + cell[:, 0].to(torch.int32) * cols + cell[:, 1]).long()
            grid = torch.zeros(2, at_once * cells, dtype=torch.float32, device=values.device)
            grid[0].index_copy_(0, at, values[head].index_select(0, part))
            grid[1].index_fill_(0, at, 1.0)
            sums = grid.view(2 * at_once, 1, rows, cols)
            # Sums over the window, one axis after the other; the count of existing tokens is pooled alike.
            for size in ((kernel, 1), (1, kernel)):
                sums = functional.avg_pool2d(sums, size, 1, (size[0] // 2, size[1] // 2), divisor_override=1)
            pooled = sums.reshape(2, -1).index_select(1, at)
            values[head].index_copy_(0, part, pooled[0] / pooled[1])
