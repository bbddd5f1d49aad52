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
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).view(-1, 2)
    times = (torch.arange(frames) * 500_000).repeat_interleave(size)
    wide_times = torch.zeros(heads, tokens + 7, dtype=torch.int64)
    wide_place = torch.zeros(heads, tokens + 7, 2, dtype=torch.int16)
    wide_times[:, 3 : 3 + tokens] = times
    wide_place[:, 3 : 3 + tokens] = place.repeat(frames, 1)
    inner = slice(3, 3 + tokens)
    queries = torch.randn(heads, group, window, width, generator=random).to(dtype)
    sums = torch.rand(heads, tokens + 7, generator=random)[:, inner]
    deeper = torch.rand(heads, tokens, generator=random)
    deeper[torch.rand(heads, tokens, generator=random) < 0.2] = torch.nan
    positions = torch.cat([times[:, None] // 500_000, place.repeat(frames, 1)], dim=1).int().repeat(heads, 1, 1)
    return View(
        keys=storage[0][:, inner],
        values=storage[1][:, inner],
        time_us=wide_times[:, inner],
        place=wide_place[:, inner],
        protected=wide_times[:, inner] >= (frames - recent) * 500_000,
        layer=layer,
        layers=layers,
        block=size,
        chunk=chunk,
        queries=queries,
        prompt_keys=storage[0][:, :3],
        sums=sums,
        deeper=deeper,
        carry=torch.full_like(deeper, torch.nan),
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
        place=view.place.gather(1, at.expand(-1, -1, 2)),
        protected=torch.isin(times, latest),
        sums=None if view.sums is None else view.sums.gather(1, keep),
        deeper=None if view.deeper is None else view.deeper.gather(1, keep),
        carry=None if view.carry is None else torch.full(keep.shape, torch.nan),
        positions=None if view.positions is None else view.positions.gather(1, at.expand(-1, -1, 3)),
    )


def with_text(view: View) -> View:
    """The same with a remembered turn and a separator among the older tokens."""
    place = view.place.clone()
    place[:, 2:5] = TEXT
    place[:, 7] = SEPARATOR
    return replace(view, place=place)


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
        place=both(first.place, second.place),
        protected=both(torch.zeros_like(first.protected), second.protected),
        sums=both_if(first.sums, second.sums),
        deeper=both_if(first.deeper, second.deeper),
        carry=both_if(first.carry, second.carry),
        positions=both_if(first.positions, second.positions),
    )


VIEWS = [
    grid_view(6, 2, 3, recent=2, seed=1, group=1, window=4),
    grid_view(9, 1, 1, recent=1, seed=2, chunk=4, window=1),
    with_text(grid_view(8, 3, 3, recent=2, heads=3, seed=3, group=3)),
    joined(grid_view(5, 2, 3, seed=4), grid_view(4, 4, 2, recent=1, seed=5, window=7)),
    grid_view(8, 3, 4, recent=1, seed=6, width=32, chunk=100),
]
