"""Host memory behind a pond: frames that left the device, with one mean key a frame, layer and KV head, under a cap of its own.

A ring of tokens and a ring of frames in storage that is allocated once, in memory or in a file; when it is full the oldest frames
leave. Knows nothing about questions; `millpond.cache.retrieval` chooses what comes back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millpond.cache.arrivals import Arrival, Arrivals, Ring
from millpond.cache.storage.exchange import zeros
from millpond.cache.storage.layer import PondLayer
from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.geometry import Geometry
from millpond.memory.resumable import Pieces, Step
from millpond.positions import Rope

_TIME, _START, _COUNT = range(3)


@dataclass(frozen=True, eq=False)
class HostCacheState:
    """What a host cache holds.

    Attributes:
        size: frames and tokens that there is storage for. ring, span, bytes_out, seconds: as in `HostCache`.
        moved: by how much re-anchoring moved the stream so far, int64 [axes].
        tensors: storage by name, as far as it has ever been written; views. Empty while none is allocated.
    """

    size: tuple[int, int]
    ring: Ring
    span: int
    bytes_out: int
    seconds: float
    moved: Tensor
    tensors: Mapping[str, Tensor]


class HostCache:
    """Frames outside the device, oldest first.

    Args:
        geometry: of the pond's cache. rope: takes the rotation out of keys.
        budget: bytes of everything held here.
        folder: where a file without a name holds the storage, mapped into memory; None for plain memory. The file is gone with
            the cache.

    Attributes:
        ring: which frames and tokens are held. bytes_out: moved to the device.
        seconds: spent on moving and on scoring.
        span: most positions that a frame took on the first axis, from its first token to its last.

    Raises:
        BudgetError: when the first frame comes: the folder has no space.
    """

    def __init__(self, geometry: Geometry, rope: Rope, budget: int, folder: str | Path | None = None) -> None:
        self.geometry, self.rope, self.budget, self.folder = geometry, rope, budget, folder
        self.ring = Ring()
        self.bytes_out = self.span = 0
        self.seconds = 0.0
        self._moved = torch.zeros(geometry.axes, dtype=torch.int64)  # by how much re-anchoring moved the stream so far
        self._buffer: Tensor | None = None
        self._rows = self._slots = 0

    @staticmethod
    def token_bytes(geometry: Geometry) -> int:
        """Bytes of one token: keys and values, positions (int64) and grid position."""
        return geometry.kv_bytes_per_token + 8 * geometry.axes + 4

    @staticmethod
    def frame_bytes(geometry: Geometry) -> int:
        """Bytes of one frame beside its tokens: its line in the table, and its keys' sums in float32."""
        return 3 * 8 + geometry.layers * geometry.kv_heads * geometry.head_dim * 4

    @classmethod
    def check(cls, geometry: Geometry, budget: int, group_tokens: int) -> None:
        """Refuse a budget that cannot hold one frame of `group_tokens` tokens.

        Raises:
            BudgetError: names the minimum that works.
        """
        minimum = group_tokens * cls.token_bytes(geometry) + cls.frame_bytes(geometry)
        if budget < minimum:
            raise BudgetError(
                f"a host budget of {format_bytes(budget)} cannot hold one frame: the minimum that works is {minimum} bytes",
                minimum=minimum,
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated; never above the budget."""
        return 0 if self._buffer is None else self._buffer.untyped_storage().nbytes()

    @property
    def frames(self) -> int:
        """Frames held."""
        return self.ring.end - self.ring.first

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.ring.next - int(self._table[self.ring.first % self._rows, _START]) if self.frames else 0

    def _allocate(self, rows: int, slots: int) -> None:
        geometry = self.geometry
        vectors = geometry.layers, geometry.kv_heads, slots, geometry.head_dim
        parts = (
            ("_table", torch.int64, (rows, 3)),
            ("_positions", torch.int64, (slots, geometry.axes)),
            ("_keys", geometry.dtype, vectors),
            ("_values", geometry.dtype, vectors),
            ("_key_sums", torch.float32, (geometry.layers, geometry.kv_heads, rows, geometry.head_dim)),
            ("_grid_positions", torch.int16, (slots, 2)),
        )
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in parts]
        self._rows, self._slots = rows, slots
        buffer = torch.from_numpy(self._storage(sum(sizes)))
        for (name, dtype, shape), part in zip(parts, buffer.split(sizes), strict=True):
            setattr(self, name, part.view(dtype).view(shape))
        self._buffer = buffer

    _table: Tensor
    _positions: Tensor
    _keys: Tensor
    _values: Tensor
    _key_sums: Tensor
    _grid_positions: Tensor

    def _storage(self, size: int) -> np.ndarray:
        if self.folder is None:
            return zeros((size,), torch.uint8, torch.device("cpu")).numpy()
        reserve = getattr(os, "posix_fallocate", None)  # a full disk says so now, not in the middle of the stream
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if reserve is not None:
                    reserve(file.fileno(), 0, size)
                return np.memmap(file, dtype=np.uint8, mode="w+" if reserve is None else "r+", shape=size)
        except OSError as error:
            what = f"no file of {format_bytes(size)} for host memory in {str(self.folder)!r}"
            raise BudgetError(f"{what}: {error}") from error

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds spent inside."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - began

    def arrange(self, time_us: Tensor, group_tokens: int) -> Arrivals:
        """Find space for the frame tokens that leave, in stream order; nothing that is held changes.

        A frame may leave in parts, one behind the other. What is larger than the whole cache is forgotten at once.

        Args:
            time_us: int64 [m], on any device. group_tokens: of a frame, by which the storage is cut when it is first needed.

        Raises:
            BudgetError: when the first frame comes: the folder or the machine has no space.
        """
        if self._buffer is None:
            each, beside = self.token_bytes(self.geometry), self.frame_bytes(self.geometry)
            most = max(1, self.budget // (group_tokens * each + beside))
            self._allocate(most, (self.budget - most * beside) // each)
        times, counts = (part.tolist() for part in time_us.unique_consecutive(return_counts=True))
        latest = self._table[(self.ring.end - 1) % self._rows].tolist() if self.frames else None
        goes_on = latest is not None and times[:1] == latest[_TIME : _TIME + 1]
        # From the newest back: what is older than what fits is left out.
        taken = tokens = 0
        for at in reversed(range(len(times))):
            tokens += counts[at] + (latest[_COUNT] if latest is not None and goes_on and at == 0 else 0)
            if tokens > self._slots or taken == self._rows:
                break
            taken += 1
        skipped = len(times) - taken
        first = sum(counts[:skipped])
        arrivals: list[Arrival] = []
        ring = self.ring
        oldest, end, behind = ring.first, ring.end, ring.next
        for time, count in zip(times[skipped:], counts[skipped:], strict=True):
            new = not goes_on or first > 0
            while oldest < self.ring.end and (
                behind - self._start(oldest) + count > self._slots or end - oldest + new > self._rows
            ):
                oldest += 1
            end += new
            start, held = (behind, 0) if new or latest is None else latest[_START:]
            line = torch.tensor([time, start, held + count])
            arrivals.append(Arrival((end - 1) % self._rows, behind, first, count, line, new))
            behind += count
            first += count
        bytes_in = ring.bytes_in + sum(frame.count for frame in arrivals) * self._moving * self.geometry.layers
        after = Ring(oldest, end, behind, ring.forgotten + skipped + oldest - ring.first, bytes_in)
        return Arrivals(after, tuple(arrivals))

    def register(self, arrivals: Arrivals, grid_position: Tensor, positions: Tensor) -> None:
        """Write down which frame tokens come, before `offloading` takes each layer's; can be repeated until then.

        Args:
            grid_position: int16 [m, 2]. positions: int [m, axes]. Of the tokens that were arranged, on any device.
        """
        for frame in arrivals.frames:
            self._table[frame.row] = frame.line
            if frame.new:
                self._key_sums[:, :, frame.row] = 0
            for slot, begin, many in self._stretches(frame.slot, frame.count, frame.count):
                known = slice(frame.first + begin, frame.first + begin + many)
                self._positions[slot : slot + many] = positions[known].cpu() + self._moved
                self._grid_positions[slot : slot + many] = grid_position[known].cpu()
        self.ring = arrivals.ring
        for number in range(max(self.ring.first, self.ring.end - len(arrivals.frames)), self.ring.end):
            low, high = self.extent(number)
            self.span = max(self.span, high - low)

    def _start(self, number: int) -> int:
        return int(self._table[number % self._rows, _START])

    def _stretches(self, slot: int, count: int, at_most: int) -> Iterator[tuple[int, int, int]]:
        """`count` tokens from `slot` on, cut where the ring ends and at `at_most`: (slot in the ring, tokens before, tokens)."""
        done = 0
        while done < count:
            at = (slot + done) % self._slots
            many = min(at_most, count - done, self._slots - at)
            yield at, done, many
            done += many

    def offloading(self, arrivals: Arrivals, index: int, layer: PondLayer, leave: Tensor, at_most: int) -> Step:
        """The step that copies what was registered out of one layer, rotation taken out, before the pond moves over it. See `Steps`.

        Args:
            leave: int64 [m], slots of the leaving tokens. at_most: tokens of all heads copied at a time.
        """
        pieces = [(one, *part) for one in arrivals.frames for part in self._stretches(one.slot, one.count, at_most)]

        def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
            frame, slot, begin, many = pieces[number]
            part = leave[frame.first + begin :][:many]
            keys = layer.keys[0].index_select(1, part).to(torch.float32)
            self.rope.rotate_(keys, (self._moved - self._positions[slot : slot + many]).to(keys.device))
            return (
                keys,
                self._key_sums[index, :, frame.row] + keys.sum(dim=1).cpu(),
                layer.values[0].index_select(1, part),
            )

        def write(number: int, keys: Tensor, sums: Tensor, values: Tensor) -> None:
            frame, slot, _, many = pieces[number]
            self._keys[index, :, slot : slot + many].copy_(keys)
            self._values[index, :, slot : slot + many].copy_(values)
            self._key_sums[index, :, frame.row] = sums

        progress = Pieces()

        def run() -> None:
            with self.timed():
                progress.run(len(pieces), make, write)

        return run

    @property
    def _moving(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.geometry.kv_heads * self.geometry.vector_bytes

    def moved(self, spatial: int, temporal: int) -> Tensor:
        """By how much the stream will have moved, int64 [axes], once its positions have moved back so far: see
        `millpond.positions.Clock.shift`."""
        by = torch.full_like(self._moved, spatial)
        by[0] = temporal
        return self._moved + by

    def move(self, moved: Tensor) -> None:
        """The stream's positions moved back, to what `moved` gave. Distances to what is stored here stay."""
        self._moved = moved

    def key_sums(self, index: int, at_most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """One layer's sums of keys, float32 [H, n, D], and the frames' tokens, int64 [n], views of at most so many frames at a time.

        Each with the first frame's number.
        """
        number = self.ring.first
        while number < self.ring.end:
            row = number % self._rows
            count = min(at_most, self.ring.end - number, self._rows - row)
            part = slice(row, row + count)
            yield number, self._key_sums[index, :, part], self._table[part, _COUNT]
            number += count
        self.bytes_out += self.frames * self.geometry.kv_heads * self.geometry.head_dim * 4

    def size(self, number: int) -> int:
        """Tokens of a frame."""
        return int(self._table[number % self._rows, _COUNT])

    def time_us(self, number: int) -> int:
        """Stream time of a frame."""
        return int(self._table[number % self._rows, _TIME])

    def extent(self, number: int) -> tuple[int, int]:
        """Position of a frame's first and last token on the first axis, as the stream counts now."""
        start, count = self._table[number % self._rows, _START:].tolist()
        low, high = (self._positions[slot % self._slots, 0] - self._moved[0] for slot in (start, start + count - 1))
        return int(low), int(high)

    def pieces(self, index: int, number: int, count: int, at_most: int) -> Iterator[tuple[Tensor, ...]]:
        """The first `count` tokens of a frame in one layer, at most so many at a time.

        Yields:
            keys [H, n, D] without rotation and values [H, n, D], views; positions int64 [n, axes] as the stream counts now;
            grid positions int16 [n, 2].
        """
        start = int(self._table[number % self._rows, _START])
        for slot, _, many in self._stretches(start, count, at_most):
            part = slice(slot, slot + many)
            moved = self._positions[part] - self._moved
            yield self._keys[index, :, part], self._values[index, :, part], moved, self._grid_positions[part]
        self.bytes_out += count * self._moving

    def usage(self) -> dict[str, Any]:
        """What `millpond.Usage` shows of it, by its names there."""
        return {
            "host_budget_bytes": self.budget,
            "host_bytes": self.nbytes,
            "host_frames": self.frames,
            "host_frames_forgotten": self.ring.forgotten,
            "host_bytes_in": self.ring.bytes_in,
            "host_bytes_out": self.bytes_out,
            "seconds_host": self.seconds,
        }

    def state(self) -> HostCacheState:
        """What is held."""
        counts = self.ring, self.span, self.bytes_out, self.seconds
        return HostCacheState((self._rows, self._slots), *counts, self._moved, self._written(self.ring))

    def restore(self, state: HostCacheState) -> None:
        """Copy what the `state` of a host cache with the same geometry says; in a file of its own where this one is in a file."""
        if state.tensors:
            self._allocate(*state.size)
        for name, mine in self._written(state.ring).items():
            mine.copy_(state.tensors[name])
        self.ring, self.span, self.bytes_out, self.seconds = state.ring, state.span, state.bytes_out, state.seconds
        self._moved = state.moved.clone()

    def _written(self, ring: Ring) -> dict[str, Tensor]:
        """The storage by name, as far as it was written to for what a ring holds; empty while none is allocated."""
        if self._buffer is None:
            return {}
        # What was never written stays untouched, so that it takes no memory in a copy either.
        slots, rows = min(ring.next, self._slots), min(ring.end, self._rows)
        return {
            "keys": self._keys[:, :, :slots],
            "values": self._values[:, :, :slots],
            "positions": self._positions[:slots],
            "grid_position": self._grid_positions[:slots],
            "sums": self._key_sums[:, :, :rows],
            "table": self._table[:rows],
        }
