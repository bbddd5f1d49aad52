"""Host memory behind a pond: frames that left the device, with one mean key a frame, layer and KV head, under a cap of its own.

A ring of tokens and a ring of frames in storage that is allocated once, in memory or in a file; when it is full the oldest frames
leave. Knows nothing about questions; `millpond.cache.recall` chooses what comes back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millpond.budget import format_bytes
from millpond.cache.layer import PondLayer
from millpond.errors import BudgetError
from millpond.geometry import Geometry
from millpond.positions import Rope

__all__ = ["HostTier"]

_TIME, _START, _COUNT = range(3)


@dataclass(frozen=True)
class _Arrival:
    """Tokens of one frame that a pass brings.

    Attributes:
        row: of the frame. slot: of its first new token, before the ring's modulo.
        first, count: which of the leaving tokens they are.
    """

    row: int
    slot: int
    first: int
    count: int


class HostTier:
    """Frames outside the device, oldest first.

    Args:
        geometry: of the pond's cache.
        rope: takes the rotation out of keys.
        budget: bytes of everything held here.
        folder: where a file without a name holds the storage, mapped into memory; None for plain memory. The file is gone with
            the tier.

    Attributes:
        first, end: frames held are numbered `first`, ..., `end` - 1, by their order in the stream.
        forgotten: frames that left because the tier was full.
        bytes_in, bytes_out: moved from the device, and to it.
        seconds: spent on moving and on scoring.
        span: most positions that a frame took on the first axis, from its first token to its last.

    Raises:
        BudgetError: when the first frame comes: the folder has no room.
    """

    def __init__(self, geometry: Geometry, rope: Rope, budget: int, folder: str | Path | None = None) -> None:
        self.geometry, self.rope, self.budget, self.folder = geometry, rope, budget, folder
        self.first = self.end = self.forgotten = self.bytes_in = self.bytes_out = self.span = 0
        self.seconds = 0.0
        self._next = 0  # tokens that ever came in: the next one's slot, before the ring's modulo
        self._moved = torch.zeros(geometry.axes, dtype=torch.int64)  # by how much re-anchoring moved the stream so far
        self._buffer: Tensor | None = None
        self._arrivals: list[_Arrival] = []
        self._rows = self._slots = 0

    # --- size ---------------------------------------------------------------------------------------------------

    @staticmethod
    def token_bytes(geometry: Geometry) -> int:
        """Bytes of one token: keys and values, positions (int64) and place."""
        return geometry.kv_bytes_per_token + 8 * geometry.axes + 4

    @staticmethod
    def frame_bytes(geometry: Geometry) -> int:
        """Bytes of one frame beside its tokens: its line in the table, and its keys' sums in float32."""
        return 3 * 8 + geometry.layers * geometry.kv_heads * geometry.head_dim * 4

    @classmethod
    def check(cls, geometry: Geometry, budget: int, group_tokens: int) -> None:
        """Refuse a budget that cannot hold one frame of `group_tokens` tokens.

        Raises:
            BudgetError: names the least that works.
        """
        least = group_tokens * cls.token_bytes(geometry) + cls.frame_bytes(geometry)
        if budget < least:
            raise BudgetError(
                f"a host budget of {format_bytes(budget)} cannot hold one frame: the least that works is {least} bytes",
                least=least,
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated; never above the budget."""
        return 0 if self._buffer is None else self._buffer.untyped_storage().nbytes()

    @property
    def frames(self) -> int:
        """Frames held."""
        return self.end - self.first

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._next - int(self._table[self.first % self._rows, _START]) if self.frames else 0

    def _allocate(self, rows: int, slots: int) -> None:
        geometry = self.geometry
        vectors = geometry.layers, geometry.kv_heads, slots, geometry.head_dim
        parts = (
            ("_table", torch.int64, (rows, 3)),
            ("_positions", torch.int64, (slots, geometry.axes)),
            ("_keys", geometry.dtype, vectors),
            ("_values", geometry.dtype, vectors),
            ("_sums", torch.float32, (geometry.layers, geometry.kv_heads, rows, geometry.head_dim)),
            ("_place", torch.int16, (slots, 2)),
        )
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in parts]
        self._rows, self._slots = rows, slots
        self._buffer = torch.from_numpy(self._storage(sum(sizes)))
        for (name, dtype, shape), part in zip(parts, self._buffer.split(sizes), strict=True):
            setattr(self, name, part.view(dtype).view(shape))

    _table: Tensor
    _positions: Tensor
    _keys: Tensor
    _values: Tensor
    _sums: Tensor
    _place: Tensor

    def _storage(self, size: int) -> np.ndarray:
        if self.folder is None:
            return np.zeros(size, dtype=np.uint8)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(
                        file.fileno(), 0, size
                    )  # a full disk says so now, not in the middle of the stream
                return np.memmap(
                    file, dtype=np.uint8, mode="r+" if hasattr(os, "posix_fallocate") else "w+", shape=size
                )
        except OSError as error:
            raise BudgetError(
                f"no file of {format_bytes(size)} for host memory in {str(self.folder)!r}: {error}"
            ) from error

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds spent inside."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - began

    # --- in -----------------------------------------------------------------------------------------------------

    def admit(self, time_us: Tensor, place: Tensor, positions: Tensor, group_tokens: int) -> None:
        """Make room for the frame tokens that leave, in stream order; then `store` takes each layer's.

        A frame may leave in parts, one behind the other. What is larger than the whole tier is forgotten at once.

        Args:
            time_us: int64 [m]. place: int16 [m, 2]. positions: int [m, axes]. On any device.
            group_tokens: of a frame, by which the storage is cut when it is first needed.
        """
        if self._buffer is None:
            each, beside = self.token_bytes(self.geometry), self.frame_bytes(self.geometry)
            most = max(1, self.budget // (group_tokens * each + beside))
            self._allocate(most, (self.budget - most * beside) // each)
        times, counts = (part.tolist() for part in time_us.unique_consecutive(return_counts=True))
        latest = self._table[(self.end - 1) % self._rows].tolist() if self.frames else None
        goes_on = latest is not None and times[:1] == latest[_TIME : _TIME + 1]
        # From the newest back: what is older than what fits has no place.
        taken = tokens = 0
        for at in reversed(range(len(times))):
            tokens += counts[at] + (latest[_COUNT] if latest is not None and goes_on and at == 0 else 0)
            if tokens > self._slots or taken == self._rows:
                break
            taken += 1
        skipped = len(times) - taken
        self.forgotten += skipped
        first = sum(counts[:skipped])
        self._arrivals = []
        for time, count in zip(times[skipped:], counts[skipped:], strict=True):
            new = not goes_on or first > 0
            self._make_room(count, frames=int(new))
            self.end += new
            row = (self.end - 1) % self._rows
            if new:
                self._table[row] = torch.tensor([time, self._next, 0])
                self._sums[:, :, row] = 0
            self._table[row, _COUNT] += count
            for slot, begin, many in self._stretches(self._next, count, count):
                known = slice(first + begin, first + begin + many)
                self._positions[slot : slot + many] = positions[known].cpu()
                self._positions[slot : slot + many] += self._moved
                self._place[slot : slot + many] = place[known].cpu()
            self._arrivals.append(_Arrival(row, self._next, first, count))
            self._next += count
            first += count
            low, high = self.extent(self.end - 1)
            self.span = max(self.span, high - low)

    def _stretches(self, slot: int, count: int, at_most: int) -> Iterator[tuple[int, int, int]]:
        """`count` tokens from `slot` on, cut where the ring ends and at `at_most`: (slot in the ring, tokens before, tokens)."""
        done = 0
        while done < count:
            at = (slot + done) % self._slots
            many = min(at_most, count - done, self._slots - at)
            yield at, done, many
            done += many

    def _make_room(self, tokens: int, *, frames: int) -> None:
        while self.frames and (self.tokens + tokens > self._slots or self.frames + frames > self._rows):
            self.first += 1
            self.forgotten += 1

    def store(self, index: int, layer: PondLayer, leave: Tensor, at_most: int) -> None:
        """Copy what was admitted out of one layer, rotation taken out, before the pond moves over it.

        Args:
            leave: int64 [m], slots of the leaving tokens. at_most: tokens of all heads copied at a time.
        """
        for frame in self._arrivals:
            for slot, begin, many in self._stretches(frame.slot, frame.count, at_most):
                part, into = leave[frame.first + begin :][:many], slice(slot, slot + many)
                keys = layer.keys[0].index_select(1, part).to(torch.float32)
                self.rope.rotate_(keys, (self._moved - self._positions[into]).to(keys.device))
                self._keys[index, :, into].copy_(keys)
                self._sums[index, :, frame.row] += keys.sum(dim=1).cpu()
                self._values[index, :, into].copy_(layer.values[0].index_select(1, part))
        self.bytes_in += sum(frame.count for frame in self._arrivals) * self._moving

    @property
    def _moving(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * self.geometry.kv_heads * self.geometry.vector_bytes

    def move(self, spatial: int, temporal: int) -> None:
        """The stream's positions moved back: see `millpond.positions.Clock.shift`. Distances to what is stored here stay."""
        self._moved[0] += temporal
        self._moved[1:] += spatial

    # --- out ----------------------------------------------------------------------------------------------------

    def sums(self, index: int, at_most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """One layer's sums of keys, float32 [H, n, D], and the frames' tokens, int64 [n], views of at most so many frames at a time.

        Each with the first frame's number.
        """
        number = self.first
        while number < self.end:
            row = number % self._rows
            count = min(at_most, self.end - number, self._rows - row)
            part = slice(row, row + count)
            yield number, self._sums[index, :, part], self._table[part, _COUNT]
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
            place int16 [n, 2].
        """
        start = int(self._table[number % self._rows, _START])
        for slot, _, many in self._stretches(start, count, at_most):
            part = slice(slot, slot + many)
            yield (
                self._keys[index, :, part],
                self._values[index, :, part],
                self._positions[part] - self._moved,
                self._place[part],
            )
        self.bytes_out += count * self._moving

    def usage(self) -> dict[str, Any]:
        """What `millpond.Usage` shows of it, by its names there."""
        return {
            "host_budget_bytes": self.budget,
            "host_bytes": self.nbytes,
            "host_frames": self.frames,
            "host_frames_forgotten": self.forgotten,
            "host_bytes_in": self.bytes_in,
            "host_bytes_out": self.bytes_out,
            "seconds_host": self.seconds,
        }

    def fork(self) -> HostTier:
        """A copy that shares nothing, in a file of its own where this one is in a file."""
        other = HostTier(self.geometry, self.rope, self.budget, self.folder)
        if self._buffer is not None:
            other._allocate(self._rows, self._slots)
            slots, rows = min(self._next, self._slots), min(self.end, self._rows)
            # What was never written stays untouched, so that it takes no memory in the copy either.
            for mine, copy in ((self._keys, other._keys), (self._values, other._values)):
                copy[:, :, :slots].copy_(mine[:, :, :slots])
            other._positions[:slots].copy_(self._positions[:slots])
            other._place[:slots].copy_(self._place[:slots])
            other._sums[:, :, :rows].copy_(self._sums[:, :, :rows])
            other._table[:rows].copy_(self._table[:rows])
        other._moved = self._moved.clone()
        for name in ("first", "end", "forgotten", "bytes_in", "bytes_out", "span", "seconds", "_next"):
            setattr(other, name, getattr(self, name))
        return other
