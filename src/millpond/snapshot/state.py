"""What a stream goes on with, taken apart into plain values and named tensors; and the same, empty, in its place in another session.

The tensors are views of the memory itself. Saving writes them where they lie, and loading reads into them where they lie, so neither
needs a second copy. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millpond.cache.arrivals import Ring
from millpond.cache.host import HostCache, HostCacheState
from millpond.cache.plan import Plan
from millpond.cache.pond import PondState
from millpond.cache.proxy_queries import QueriesState
from millpond.cache.recent import RecentWindow
from millpond.cache.storage.base import StorageState
from millpond.cache.storage.layer import METADATA, VECTORS, LayerState
from millpond.memory.available import check_memory
from millpond.models.base import Grid
from millpond.positions import Clock
from millpond.snapshot.plain import encode, from_values, number, numbers, to_values
from millpond.stream.ingest import Ingest, Standing
from millpond.stream.recent_frames import Shot
from millpond.stream.runner import Runner
from millpond.stream.runner_state import RunnerState

# Positions are stored in 32 bits; a stream's time, in microseconds, ends at 10^11 seconds.
_FARTHEST = (1 << 31) - 1
_MOST_TIME = 10**17
_HOST_TENSORS = ("keys", "values", "positions", "grid_position", "sums", "table")

Taken = dict[str, Tensor | np.ndarray]


def values_of(runner: Runner, ingest: Ingest) -> tuple[dict[str, Any], Taken]:
    """A stream at rest: plain values, and its tensors by name, which are views."""
    state, at = runner.state(), ingest.state()
    pond, tensors = state.pond, dict(tensors_of(state, at))

    def put(tensor: Tensor) -> str:
        name = f"admission.{sum(key.startswith('admission.') for key in tensors)}"
        tensors[name] = tensor
        return name

    kinds = () if runner.admission is None else runner.admission.state_types
    host = None if pond.host is None else {**to_values(pond.host), "ring": to_values(pond.host.ring)}
    if host is not None:
        del host["tensors"], host["moved"]
    stream = {
        "budget": state.budget,
        "grid": None if state.grid is None else to_values(state.grid),
        "plan": _plan_values(pond.plan),
        "peak_bytes": runner.pond.ledger.peak,
        "clock": to_values(state.clock),
        "tokens": state.tokens,
        "reanchorings": state.reanchorings,
        "seconds": dict(state.seconds),
        "admission": encode(state.admission, put, kinds),
        "layers": [
            [layer.length, capacity, layer.groups]
            for layer, capacity in zip(pond.storage.layers, pond.storage.capacities, strict=True)
        ],
        "queries": list(pond.queries.counts),
        "host": host,
        "recent_text": pond.recent.text,
        "compactions": pond.compactions,
        "evicted": pond.evicted,
        "frames": {
            **to_values(at),
            "grid": None if at.grid is None else to_values(at.grid),
            "waiting": [[time, *frame.shape[:2]] for time, frame in at.waiting],
            "recent": [[[time, *frame.shape[:2]] for time, frame in group] for group in at.recent],
        },
    }
    return stream, tensors


def tensors_of(state: RunnerState, at: Standing) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """Every tensor of a stream by its name in a snapshot, but for what an admission remembers."""
    pond = state.pond
    for index, layer in enumerate(pond.storage.layers):
        for name, tensor in layer.tensors.items():
            yield f"layers.{index}.{name}", tensor
        for name, tensor in layer.quantized.items():
            yield f"layers.{index}.quantized.{name}", tensor
    yield "queries", pond.queries.rows
    if pond.host is not None:
        yield "host.moved", pond.host.moved
        for name, tensor in pond.host.tensors.items():
            yield f"host.{name}", tensor
    yield "recent", torch.tensor(pond.recent.groups, dtype=torch.int64).view(-1, 2)
    for index, (_, frame) in enumerate(at.waiting):
        yield f"waiting.{index}", frame
    for index, (_, frame) in enumerate(frame for group in at.recent for frame in group):
        yield f"recent_frames.{index}", frame


def _plan_values(plan: Plan) -> dict[str, Any]:
    sizes = {name: getattr(plan, name) for name in ("slots", "block_groups", "chunk", "quantized_tokens")}
    return {**sizes, "lines": {line.name: [line.slots, line.bytes] for line in plan.lines}}


class Empty:
    """A stream's state as a snapshot's plain values have it, held to what can be, with its tensors still to be read.

    Args:
        runner: new, with the session's settings. stream: what `values_of` gave.

    Attributes:
        plan, grid: how the budget is split, for which frames.

    Raises:
        ValueError: the values cannot be those of such a stream. BudgetError: the machine does not have the memory.
    """

    def __init__(self, runner: Runner, stream: dict[str, Any]) -> None:
        self._runner, self._stream = runner, stream
        self.grid = self._grid(stream["grid"])
        self.plan = self._planned(stream["plan"])
        check_memory(self.plan.total_bytes, runner.family.device)
        if runner.config.host_budget is not None and runner.config.host_path is None:
            check_memory(runner.config.host_budget)

    def _grid(self, values: Any) -> Grid | None:
        if values is None:
            return None
        grid = from_values(Grid, values)
        if grid != self._runner.family.grid(number(grid.height, 1), number(grid.width, 1)):
            raise ValueError("this model has no frames of that size")
        return grid

    def _planned(self, values: Any) -> Plan:
        plan, capped = self._runner.plan_for(self.grid), self._runner.policy.capped
        slots = number(values["slots"])
        if not capped:
            # What grows by itself needs no more room than it has taken, and takes more when it needs it.
            layers = self._stream["layers"]
            slots = min(slots, plan.slots + 2 * sum(number(layer[0]) for layer in layers) // len(layers))
        plan = plan if slots == plan.slots else plan.with_slots(slots)
        for name, value in _plan_values(plan).items():
            if value != values[name] and (capped or name not in ("slots", "lines")):
                raise ValueError(f"this millpond splits the budget in another way: {name} would be {value}")
        return plan

    def state(self) -> RunnerState:
        """For `Runner.restore`: everything but the bytes of the memory, for which one zero stands."""
        stream, runner = self._stream, self._runner
        clock = from_values(Clock, stream["clock"])
        if max(map(abs, (clock.next, clock.base or 0, clock.origin, clock.step))) > _FARTHEST:
            raise ValueError("its clock stands where no position is")
        seconds = stream["seconds"]
        if seconds.keys() != runner.seconds.keys() or not all(type(spent) is float for spent in seconds.values()):
            raise ValueError("the seconds spent are none")
        text = stream["recent_text"]
        pond = PondState(
            self.plan,
            self._storage(),
            QueriesState(torch.zeros(()), tuple(self._counts())),
            self._host(stream["host"]),
            RecentWindow((), None if text is None else number(text)),
            number(stream["compactions"]),
            number(stream["evicted"]),
        )
        counts = number(stream["tokens"]), number(stream["reanchorings"])
        return RunnerState(self._runner.config.budget, self.grid, clock, *counts, seconds, None, pond)

    def _storage(self) -> StorageState:
        geometry, plan, tier = self._runner.family.geometry, self.plan, self._runner.policy.needs.quantized_tier
        rows = [numbers(row, 0, plan.slots * geometry.layers) for row in self._stream["layers"]]
        if len(rows) != geometry.layers or any(len(row) != 3 for row in rows):
            raise ValueError("it has other layers")
        lengths, capacities, groups = zip(*rows, strict=True)
        most = plan.quantized_tokens // tier.quantizer.group if tier else 0
        shared = self._runner.policy.needs.layer_share > 1
        if (
            any(not plan.prompt_tokens <= length <= capacity for length, capacity, _ in rows)
            or len(set(groups)) > 1
            or groups[0] > most
            or sum(capacities) > plan.slots * geometry.layers
            or (not shared and (len(set(lengths)) > 1 or set(capacities) != {plan.slots}))
        ):
            raise ValueError("its layers hold more than they can, or not what they must")
        summed = self._runner.policy.needs.accumulated_attention
        names = [name for name in (*VECTORS, *METADATA) if summed or name != "accumulated_attention"]
        zero = dict.fromkeys(names, torch.zeros(()))
        return StorageState(tuple(LayerState(length, zero, each) for length, _, each in rows), capacities)

    def _counts(self) -> list[int]:
        geometry = self._runner.family.geometry
        counts = numbers(self._stream["queries"], 0, self.plan.query_bytes // geometry.query_bytes)
        if len(counts) != geometry.layers:
            raise ValueError("it has other layers")
        return counts

    def _host(self, values: Any) -> HostCacheState | None:
        budget, geometry = self._runner.config.host_budget, self._runner.family.geometry
        if (values is None) != (budget is None):
            raise ValueError("it has host memory, or none, against its own settings")
        if values is None or budget is None:
            return None
        rows, slots = numbers(values["size"])
        taken = rows * HostCache.frame_bytes(geometry) + slots * HostCache.token_bytes(geometry)
        ring = from_values(Ring, values["ring"])
        if not (taken <= budget and min(to_values(ring).values()) >= 0 and ring.first <= ring.end):
            raise ValueError("its host memory holds more than it can")
        if (ring.end > 0) > (rows > 0 and slots > 0) or ring.end - ring.first > rows:
            raise ValueError("its host memory holds more than it can")
        known = {
            "moved": torch.zeros(geometry.axes, dtype=torch.int64),
            "tensors": dict.fromkeys(_HOST_TENSORS, torch.zeros(())) if rows and slots else {},
            "ring": ring,
            "size": (rows, slots),
        }
        flat = {name: value for name, value in values.items() if name not in ("size", "ring")}
        return from_values(HostCacheState, flat, **known)

    def standing(self) -> Standing:
        """For `Ingest.restore`: everything but the pixels, which are still to be read into their places."""
        values = self._stream["frames"]
        grid = self._grid(values["grid"])
        waiting, recent = _sizes(values["waiting"]), [_sizes(group) for group in values["recent"]]
        if _pixels([waiting]) > self.plan.waiting_bytes or _pixels(recent) > self.plan.recent_bytes:
            raise ValueError("it holds more frames than its budget has room for")
        if {(height, width) for _, height, width in waiting} - {grid and (grid.height, grid.width)}:
            raise ValueError("its waiting frames are of another size than they say")
        flat = {name: value for name, value in values.items() if name not in ("grid", "waiting", "recent")}
        shots, groups = _shots(waiting), tuple(map(_shots, recent))
        return from_values(Standing, flat, grid=grid if waiting else None, waiting=shots, recent=groups)


def _sizes(values: Any) -> list[tuple[int, int, int]]:
    """Time, height and width of frames."""
    rows = [numbers(row, -_MOST_TIME, _MOST_TIME) for row in values]
    if any(len(row) != 3 or min(row[1:]) < 1 or max(row[1:]) > _FARTHEST for row in rows):
        raise ValueError("a frame is none")
    return [(time, height, width) for time, height, width in rows]


def _pixels(groups: list[list[tuple[int, int, int]]]) -> int:
    """Bytes of the frames of all groups."""
    return sum(3 * height * width for group in groups for _, height, width in group)


def _shots(sizes: list[tuple[int, int, int]]) -> tuple[Shot, ...]:
    return tuple((time, np.empty((height, width, 3), np.uint8)) for time, height, width in sizes)


def check_host(host: HostCache | None) -> None:
    """Hold what host memory now says of its frames to its ring: where tokens lie is read from there.

    Raises:
        ValueError: they lie elsewhere.
    """
    if host is None:
        return
    state = host.state()
    ring, (rows, slots) = state.ring, state.size
    if not state.tensors:
        return
    frames = torch.arange(ring.first, ring.end) % rows
    starts, counts = state.tensors["table"][frames, 1], state.tensors["table"][frames, 2]
    ends = starts + counts
    follow = torch.equal(starts[1:], ends[:-1]) and (not len(ends) or int(ends[-1]) == ring.next)
    if not follow or bool((counts < 1).any()) or int(counts.sum()) > slots or bool((starts < 0).any()):
        raise ValueError("the frames in its host memory do not follow each other")
