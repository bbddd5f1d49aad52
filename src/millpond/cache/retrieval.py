"""What a question brings back from host memory: in each layer the frames most like its mean query, behind the memory until it is over."""

from __future__ import annotations

import torch
from torch import Tensor

from millpond.cache.host import HostCache
from millpond.cache.pond import Pond
from millpond.policies.base import TEXT
from millpond.positions import Clock, Rope


class Retrieval:
    """Slots for retrieved frames, reserved in every layer when made, filled layer by layer while the question runs.

    Every layer retrieves its own frames and equally many tokens: the best frames in host memory, whole, until the slots of
    `Plan.retrieved_frames` frames are full. Only where frames differ in size is the last of them cut.

    They stand behind the memory in storage and in stream order among themselves. Their positions are the true ones (at the distance
    from the window that they had), or with `closed` directly in front of the window's first frame, which stays where it is: gaps
    between frames close to the clock's step. On M-RoPE the rows and columns of a frame of the window's own segment stay.

    Args:
        pond: with a host cache. clock: where the question begins.
        closed: whether gaps between retrieved frames close.

    Attributes:
        start, count: the reserved slots, the same in every layer.
    """

    def __init__(self, pond: Pond, rope: Rope, clock: Clock, *, closed: bool) -> None:
        assert pond.host is not None
        self._pond, self._host, self._rope = pond, pond.host, rope
        self._front, self._origin = _front(pond, clock)
        self._step, self._closed = clock.step, closed
        self.start, self.count = pond.length, min(pond.plan.retrieved_tokens, pond.host.tokens)
        pond.storage.reserve(self.count)

    def fill(self, index: int, queries: Tensor) -> None:
        """Choose and copy one layer's frames; called before that layer's attention.

        Args:
            queries: [n, H * g, D], the question's, without rotation.
        """
        pond, host, layer = self._pond, self._host, self._pond.layers[index]
        with pond.ledger.borrow("scratch", pond.plan.scratch_bytes), host.timed():
            chosen = self._choose(index, queries)
            at = self.start
            at_once = max(1, pond.plan.chunk // pond.geometry.kv_heads)
            for (number, count), up in zip(chosen, self._lifts(chosen), strict=True):
                for keys, values, positions, grid_position in host.pieces(index, number, count, at_once):
                    part = slice(at, at + len(grid_position))
                    at = part.stop
                    positions[:, 0] += up
                    if positions.shape[1] > 1:
                        ours = (grid_position[:, 0] > TEXT) & (positions[:, 1] - grid_position[:, 0] == self._origin)
                        positions[:, 1:] += up * ~ours[:, None]
                    layer.keys[0, :, part].copy_(keys)
                    layer.values[0, :, part].copy_(values)
                    layer.positions[:, part].copy_(positions)
                    layer.grid_position[:, part].copy_(grid_position)
                    layer.time_us[:, part] = host.time_us(number)
                    self._rope.rotate_(layer.keys[0, :, part], positions.to(layer.device))
            assert at == self.start + self.count

    def _choose(self, index: int, queries: Tensor) -> list[tuple[int, int]]:
        """Frames in stream order, with how many tokens of each."""
        geometry = self._pond.geometry
        heads, head_dim, group = geometry.kv_heads, geometry.head_dim, geometry.kv_groups
        mean = torch.zeros(heads * group, head_dim, device=queries.device)
        for part in queries.split(max(1, self._pond.plan.chunk // (heads * group))):
            mean += part.sum(dim=0, dtype=torch.float32)
        query = mean.view(heads, group, head_dim).mean(dim=1)
        left, chosen = self.count, []
        for number in nearest(self._host, index, query, self.count, self._pond.plan.chunk).tolist():
            count = min(self._host.size(number), left)
            chosen.append((number, count))
            left -= count
            if not left:
                break
        return sorted(chosen)

    def _lifts(self, chosen: list[tuple[int, int]]) -> list[int]:
        """By how many positions each frame moves up, so that they end in front of the window."""
        if not self._closed:
            return [0] * len(chosen)
        up, follows, lifts = 0, self._front, []
        for number, _ in reversed(chosen):
            low, high = self._host.extent(number)
            up += max(0, follows - high - self._step)
            follows = low
            lifts.append(up)
        return lifts[::-1]


def nearest(host: HostCache, index: int, query: Tensor, most: int, chunk: int) -> Tensor:
    """The frames whose mean key has the largest dot product with the query, best first: int64 [at most `most`], their numbers.

    Over all KV heads at once, as in ReKV's program, where the function is called a cosine and divides by no length.

    Args:
        query: float32 [H, D], a layer's mean query, averaged over the heads that share a KV head.
        chunk: mean keys of one head that are on the device at a time.
    """
    device = query.device
    best = torch.empty(0, device=device)
    numbers = torch.empty(0, dtype=torch.int64, device=device)
    for first, sums, sizes in host.key_sums(index, max(1, chunk // query.shape[0])):
        scores = (sums.to(device) @ query[:, :, None])[:, :, 0].sum(dim=0) / sizes.to(device)
        best = torch.cat([best, scores])
        numbers = torch.cat([numbers, torch.arange(first, first + len(scores), device=device)])
        order = best.topk(min(most, len(best))).indices
        best, numbers = best[order], numbers[order]
    return numbers


def _front(pond: Pond, clock: Clock) -> tuple[int, int]:
    """Position of the window's first frame token on the first axis, and the origin of its segment's grid (-1: it has none)."""
    layer, start = pond.layers[0], pond.plan.prompt_tokens
    grid_position = layer.grid_position[0, start : layer.length]
    frame = (grid_position[:, 0] != TEXT).nonzero()
    if not len(frame):
        return clock.next, -1
    seen = (grid_position[:, 0] > TEXT).nonzero()
    origin = -1
    if len(seen) and layer.positions.shape[2] > 1:
        at = int(seen[0])
        origin = int(layer.positions[0, start + at, 1]) - int(grid_position[at, 0])
    return int(layer.positions[0, start + int(frame[0]), 0]), origin
