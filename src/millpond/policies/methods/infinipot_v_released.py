"""The selection of InfiniPot-V's released code, round after round, bit for bit in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from millpond.errors import PolicyError
from millpond.policies.base import Needs, Policy, Shape, View

# torch adds the columns of a matrix up in an order that depends on a column's position among groups of four vector registers (64
# floats at the most), and in another one where the matrix is narrower than a register (16 floats at the most). Pieces that are
# cut at multiples of the first and never narrower than the second give the same bits as the whole.
_GROUP, _REGISTER = 64, 16
# By release: for each quarter of the layers the pooling kernel, and over how many axes it runs: frames, rows and columns; rows and
# columns; along the stream.
_POOLING = {"2026-01": ((7, 3), (5, 2), (3, 1), (1, 0)), "2025-11": ((7, 2), (5, 2), (3, 1), (1, 0))}


@dataclass(frozen=True)
class InfiniPotVReleased(Policy):
    """What the authors' program keeps, for comparison with published numbers.

    It differs from the paper (and from `infinipot-v`) from the second pass on: the survivors of each head are laid out as
    (frame, grid position) again although they no longer lie on a grid. Pooling, when on, goes by quarter of the layers and counts the
    padding. Its crashes are PolicyErrors here.

    In float32 on a CPU even ties fall as they do there, because every sum is taken in the same order, although no r x f x p x D product
    is ever held, as long as the value norms that it ranks, pooled or not, are below 2^24. It protects the recent tokens and TaR's by the
    largest norm + 1, which is no more than that norm from 2^24 on, where norms are infinite or not numbers, and in half precision from
    256 (bfloat16) or 2,048 (float16) on: then it may drop recent tokens. Here they are protected by a mask and stay.

    Attributes:
        tar_ratio: share of the memory for TaR and the recent frames. Published: 0.5.
        query_ratio: share of the frames in memory that are kept whole. Published: 0.25.
        adaptive_pooling: pool the value norms, as the released code can. Published: off.
        rows: rows of a frame's grid, for pooling. Published: 14 where the program was not told.
        release: "2026-01" is the head (81a4dbe; the same since 3675109, January 2026): the first quarter of the layers pools over frames,
            rows and columns, and kernels over a grid shrink to the largest odd number that its frames, rows and columns all have.
            "2025-11" is the first release (2a3b136): rows and columns only, kernels of one size.
    """

    name: ClassVar[str] = "infinipot-v-released"
    source: ClassVar[str] = "aiha-lab/InfiniPot-V, kvcache_utils.py at 2a3b136 and 81a4dbe (code read line by line)"
    needs: ClassVar[Needs] = Needs(whole_frames=True)

    tar_ratio: float = 0.5
    query_ratio: float = 0.25
    adaptive_pooling: bool = False
    rows: int = 14
    release: Literal["2026-01", "2025-11"] = "2026-01"

    def __post_init__(self) -> None:
        for field in ("tar_ratio", "query_ratio"):
            if not 0 < getattr(self, field) <= 1:
                raise PolicyError(f"{self.name}: {field} must lie above 0 and at most at 1, not {getattr(self, field)}")
        if self.rows < 1:
            raise PolicyError(f"{self.name}: rows must be at least 1, not {self.rows}")
        if self.release not in _POOLING:
            raise PolicyError(f"{self.name}: release must be {' or '.join(_POOLING)}, not {self.release!r}")

    def minimum_memory(self, block: int) -> int:
        # One of the frames is recent at least, and TaR's share of the slots holds those that are; see `keep`.
        for frames in range(1, 10_000):
            recent = int((frames + 1) * self.query_ratio)
            if recent and frames * block - round((1 - self.tar_ratio) * frames * block) >= recent * block:
                return frames * block
        ratios = f"tar_ratio {self.tar_ratio} and query_ratio {self.query_ratio}"
        raise PolicyError(f"{self.name}: with {ratios} no memory works")

    def recent(self, frames: int) -> int:
        return int(frames * self.query_ratio)

    def keep(self, view: View, slots: int) -> Tensor:
        frame = view.block
        if view.tokens % frame or slots % frame:
            given = f"{view.tokens} tokens and {slots} slots, {frame} tokens a frame"
            raise PolicyError(f"{self.name} needs whole frames: {given}")
        if bool((view.grid_position[:, :, 0] < 0).any()):
            raise PolicyError(f"{self.name} knows frames only: no remembered turns, no separators")
        latest = int(view.tokens // frame * self.query_ratio)
        if latest < 1:
            share = f"{self.query_ratio} of {view.tokens // frame} frames"
            raise PolicyError(f"{self.name}: {share} is less than one; raise the budget")
        # In this order, which is the released one: with other ratios than a half the rounding depends on it.
        by_redundancy = slots - round((1 - self.tar_ratio) * (slots // frame) * frame)
        recent = latest * frame
        if by_redundancy < recent:
            frames = f"the {latest} recent frames of {frame} tokens"
            raise PolicyError(f"{self.name}: {by_redundancy} slots for TaR cannot hold {frames}")
        kernel, axes = self._pooling(view)
        keep = torch.empty(view.heads, slots, dtype=torch.int64, device=view.keys.device)
        for head in range(view.heads):
            distinct = self._redundancy(view.keys[head], frame, recent, view.chunk).topk(by_redundancy - recent).indices
            scores = self._norms(view, head)
            if kernel > 1:
                scores = self._pool(scores, frame, kernel, axes)
            # Neither what is not a number nor what has overflowed may stand above the chosen and the recent.
            scores.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max)
            scores[distinct] = torch.inf
            del distinct
            scores[-recent:] = torch.inf
            keep[head] = scores.topk(slots).indices.sort().values
        return keep

    @staticmethod
    def _redundancy(keys: Tensor, frame: int, recent: int, chunk: int) -> Tensor:
        """TaR of the tokens before the recent frames, by slot: [n] x D keys of one head -> [n - recent]."""
        past = len(keys) - recent
        latest = _unit(keys[past:]).view(recent // frame, frame, -1)
        scores = torch.empty(past, dtype=keys.dtype, device=keys.device)
        first, span = 0, _span(chunk)
        while first < past:
            last = past if past - first < span + _REGISTER else first + span
            piece = _unit(keys[first:last])
            at = torch.arange(first, last, device=keys.device) % frame
            products = torch.empty(len(latest), last - first, dtype=keys.dtype, device=keys.device)
            for row, one in zip(products, latest, strict=True):
                torch.sum(one.index_select(0, at).mul_(piece), dim=-1, out=row)
            scores[first:last] = products.mean(dim=0).neg_()
            first = last
        return scores

    @staticmethod
    def _norms(view: View, head: int) -> Tensor:
        norms = torch.empty(view.tokens, dtype=view.values.dtype, device=view.values.device)
        for first in range(0, view.tokens, view.chunk):
            norms[first : first + view.chunk] = view.values[head, first : first + view.chunk].norm(dim=-1)
        return norms

    def _pooling(self, view: View) -> tuple[int, int]:
        """The layer's kernel, and over how many axes it runs."""
        if not self.adaptive_pooling:
            return 1, 0
        quarter = view.layers // 4
        if self.release != "2025-11":
            quarter = max(1, quarter)
        if not quarter or (view.layers - 1) // quarter >= len(_POOLING[self.release]):
            raise PolicyError(f"{self.name}: pooling by quarters does not work with {view.layers} layers")
        if view.block % self.rows:
            raise PolicyError(f"{self.name}: {view.block} tokens a frame do not make {self.rows} rows")
        kernel, axes = _POOLING[self.release][view.layer // quarter]
        if axes > 1 and self.release != "2025-11":
            kernel = min(kernel, view.tokens // view.block, self.rows, view.block // self.rows)
            kernel -= kernel % 2 == 0
        return kernel, axes

    def _pool(self, scores: Tensor, frame: int, kernel: int, axes: int) -> Tensor:
        frames = scores.view(1, -1) if axes == 1 else scores.view(-1, self.rows, frame // self.rows)
        if axes == 3:
            frames = frames[None]
        average = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[axes - 1]
        if axes == 3 and frames.is_cpu:
            frames = frames.float()  # torch cannot do this in half precision
        pooled: Tensor = average(frames, kernel, 1, kernel // 2)
        return pooled.reshape(-1).to(scores.dtype)

    def scratch(self, shape: Shape) -> int:
        # One head's scores, choice and ranking; before those the unit keys of its recent frames (norms beside them for a moment)
        # and one piece of the past, its partner and their products.
        recent, head_dim = int(shape.tokens * self.query_ratio), shape.head_dim + 2
        pieces = (_span(shape.chunk) + _REGISTER) * (3 * head_dim + recent // shape.block)
        redundancy = shape.of_head(torch.float32) + 4 * (head_dim * recent + pieces)
        ranking = shape.of_head(torch.float32) + 4 * shape.of_head(torch.int64)
        return shape.of_all(torch.int64) + max(ranking, redundancy)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / (rows.norm(dim=-1, keepdim=True) + 1e-9)
    return unit


def _span(chunk: int) -> int:
    """Columns worked on at a time."""
    return max(_GROUP, chunk - chunk % _GROUP)
