"""Views of a layer as the pond makes them: slices of storage, per-head times and places, protected latest frames."""

from dataclasses import replace

import torch

from millpond.policies.base import SEPARATOR, TEXT, View
from millpond.positions import Rope


def grid_view(
    frames: int,
    rows: int,
    cols: int,
    *,
    recent: int = 1,
    heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layer: int = 1,
    layers: int = 4,
    chunk: int = 16,
    group: int = 2,
    window: int = 3,
) -> View:
    """A first pass: every head holds every token of `frames` whole frames. Keys and values are slices of larger storage.

    Proxy queries, sums of attention and what a deeper layer left are there for whoever looks at them.
    """
    random = torch.Generator().manual_seed(seed)
    size = rows * cols
    tokens = frames * size
    storage = [torch.randn(heads, tokens + 7, width, generator=random).to(dtype) for _ in range(2)]
    storage[1] *= torch.rand(heads, tokens + 7, 1, generator=random).to(dtype) * 3
    grid_position = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).view(-1, 2)
    times = (torch.arange(frames) * 500_000).repeat_interleave(size)
    wide_times = torch.zeros(heads, tokens + 7, dtype=torch.int64)
    wide_place = torch.zeros(heads, tokens + 7, 2, dtype=torch.int16)
    wide_times[:, 3 : 3 + tokens] = times
    wide_place[:, 3 : 3 + tokens] = grid_position.repeat(frames, 1)
    inner = slice(3, 3 + tokens)
    queries = torch.randn(heads, group, window, width, generator=random).to(dtype)
    accumulated_attention = torch.rand(heads, tokens + 7, generator=random)[:, inner]
    deeper_scores = torch.rand(heads, tokens, generator=random)
    deeper_scores[torch.rand(heads, tokens, generator=random) < 0.2] = torch.nan
    positions = torch.cat([times[:, None] // 500_000, grid_position.repeat(frames, 1)], dim=1).int().repeat(heads, 1, 1)
    return View(
        keys=storage[0][:, inner],
        values=storage[1][:, inner],
        time_us=wide_times[:, inner],
        grid_position=wide_place[:, inner],
        protected=wide_times[:, inner] >= (frames - recent) * 500_000,
        layer=layer,
        layers=layers,
        block=size,
        chunk=chunk,
        queries=queries,
        prompt_keys=storage[0][:, :3],
        accumulated_attention=accumulated_attention,
        deeper_scores=deeper_scores,
        carried_scores=torch.full_like(deeper_scores, torch.nan),
        positions=positions,
        rope=rope(width),
    )


def rope(width: int) -> Rope:
    """Three axes, the time's frequencies first."""
    half = width // 2
    return Rope(100.0 ** -(torch.arange(half) / half), torch.arange(half) * 3 // half, 10_000)


def thinned(view: View, keep: torch.Tensor, recent: int) -> View:
    """The view of the next pass, after `keep`: heads hold different tokens. The `recent` latest frames are protected."""
    at = keep[:, :, None]
    times = view.time_us.gather(1, keep)
    latest = view.time_us[0].unique()[-recent:]
    return replace(
        view,
        keys=view.keys.gather(1, at.expand(-1, -1, view.keys.shape[2])),
        values=view.values.gather(1, at.expand(-1, -1, view.keys.shape[2])),
        time_us=times,
        grid_position=view.grid_position.gather(1, at.expand(-1, -1, 2)),
        protected=torch.isin(times, latest),
        accumulated_attention=None
        if view.accumulated_attention is None
        else view.accumulated_attention.gather(1, keep),
        deeper_scores=None if view.deeper_scores is None else view.deeper_scores.gather(1, keep),
        carried_scores=None if view.carried_scores is None else torch.full(keep.shape, torch.nan),
        positions=None if view.positions is None else view.positions.gather(1, at.expand(-1, -1, 3)),
    )


def with_text(view: View) -> View:
    """The same with a remembered turn and a separator among the older tokens."""
    grid_position = view.grid_position.clone()
    grid_position[:, 2:5] = TEXT
    grid_position[:, 7] = SEPARATOR
    return replace(view, grid_position=grid_position)


def joined(first: View, second: View) -> View:
    """Frames of one size followed by frames of another."""

    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], dim=1)

    def both_if(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None or b is None else both(a, b)

    return replace(
        second,
        keys=both(first.keys, second.keys),
        values=both(first.values, second.values),
        time_us=both(first.time_us, second.time_us + 10**9),
        grid_position=both(first.grid_position, second.grid_position),
        protected=both(torch.zeros_like(first.protected), second.protected),
        accumulated_attention=both_if(first.accumulated_attention, second.accumulated_attention),
        deeper_scores=both_if(first.deeper_scores, second.deeper_scores),
        carried_scores=both_if(first.carried_scores, second.carried_scores),
        positions=both_if(first.positions, second.positions),
    )


VIEWS = [
    grid_view(6, 2, 3, recent=2, seed=1, group=1, window=4),
    grid_view(9, 1, 1, recent=1, seed=2, chunk=4, window=1),
    with_text(grid_view(8, 3, 3, recent=2, heads=3, seed=3, group=3)),
    joined(grid_view(5, 2, 3, seed=4), grid_view(4, 4, 2, recent=1, seed=5, window=7)),
    grid_view(8, 3, 4, recent=1, seed=6, width=32, chunk=100),
]
