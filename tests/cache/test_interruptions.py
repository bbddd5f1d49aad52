"""Moves of memory that are interrupted anywhere: the pond is as an untouched twin then, or as one that was never interrupted."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millpond import cache, policies
from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.host import HostCache
from millpond.cache.plan import Plan
from millpond.cache.rerotation import close_gaps, shift_uniformly
from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer
from millpond.errors import BudgetError, MillpondError
from millpond.memory.geometry import Geometry
from millpond.ops import dispatch
from millpond.policies.base import TEXT, Policy
from millpond.policies.methods.mikv import MiKV
from millpond.positions import Clock, Rope
from tests.cache.text_model import Scattered
from tests.session.faults import files_of
from tests.session.test_layer_budgets import layered

WIDTH, ROWS, COLS, STEP = 8, 2, 2, 4
ROPE = Rope(1.0 / (10_000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)), torch.tensor([0, 0, 1, 2]), limit=600)
WATCHED = {
    *map(str, Path(cache.__file__).parent.rglob("*.py")),
    *files_of(
        "millpond.memory.resumable",
        "millpond.policies.scoring.merging",
        "millpond.policies.scoring.matching",
        "millpond.ops.compaction",
        "millpond.ops.merging",
    ),
}
FAULTS = (RuntimeError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)

POLICIES: dict[str, Callable[[], Policy]] = {
    "a layer each": Scattered,
    "arena": lambda: layered("random", 0.6, 1.4),
    "low bits": lambda: MiKV(bits=4, group=4, full_share=0.5, base=Scattered()),
    "host": lambda: policies.get("rekv", frames=2),
    "accumulated_attention": lambda: policies.get("h2o"),
    "merging": lambda: policies.get("kvmerger", window=4),
    "deepest first": lambda: policies.get("hermes"),
}
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=WIDTH, dtype=torch.float32, axes=3)


@dataclass
class Scene:
    """A pond with a full memory, and its stream's clock."""

    pond: Pond
    clock: Clock


def plan_for(policy: Policy, above: int) -> Plan:
    """Of the minimum budget, and so many tokens above it."""
    numbers = {"prompt_tokens": 3, "group_tokens": ROWS * COLS, "reserve_tokens": 5, "proxy_tokens": 3}
    with pytest.raises(BudgetError) as minimum:
        make_plan(1, GEOMETRY, policy, **numbers)
    budget = minimum.value.minimum + above * GEOMETRY.bytes_per_token
    return replace(make_plan(budget, GEOMETRY, policy, **numbers), chunk=3)


def scene(kind: str, above: int = 12) -> Scene:
    torch.manual_seed(0)
    policy = POLICIES[kind]()
    pond = Pond(GEOMETRY, plan_for(policy, above), policy, torch.device("cpu"))
    pond.rope = ROPE
    pond.queries.rows.normal_()
    pond.queries.counts = [pond.plan.query_bytes // GEOMETRY.query_bytes] * GEOMETRY.layers
    if policy.needs.retrieved_frames:
        pond.host = HostCache(GEOMETRY, ROPE, 60 * HostCache.token_bytes(GEOMETRY))
    clock = Clock(step=STEP)
    grid = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLS))

    def append(positions: torch.Tensor, grid_position: torch.Tensor, time: int, *, prompt: bool = False) -> None:
        count = len(grid_position)
        times = torch.full((count,), time)
        pond.write_metadata(times, grid_position.to(torch.int16), positions)
        for layer in range(GEOMETRY.layers):
            pond.update(torch.randn(1, 2, count, WIDTH), torch.randn(1, 2, count, WIDTH), layer)
        for layer in pond.layers:
            if layer.accumulated_attention is not None:
                layer.accumulated_attention[:, : layer.length].uniform_()
        if not prompt:
            pond.commit(times, grid_position.to(torch.int16))

    append(clock.text(3).expand(3, -1), torch.full((3, 2), TEXT), 0, prompt=True)
    time = 0
    while True:
        time += 1
        if pond.overrun(ROWS * COLS) > 0 and pond.compactions >= 3:
            return Scene(pond, clock)
        pond.ensure_capacity(ROWS * COLS)
        base = clock.open_segment(0)
        first = clock.origin + clock.groups * 3 * STEP  # gaps to close
        clock.groups += 1
        at = torch.stack([torch.full((len(grid),), first), base + grid[:, 0], base + grid[:, 1]])
        append(at, grid, time)
        clock.next = max(clock.next, int(at.max()) + 1)


def copied(scene: Scene) -> Scene:
    """A second one on storage of its own; the ledger's lock has no copy."""
    return copy.deepcopy(scene, {id(scene.pond.ledger._entering): threading.Lock()})


def compact(one: Scene) -> None:
    one.pond.compact(one.pond.full_precision_tokens - 6)


def smaller(one: Scene) -> None:
    one.pond.resize(plan_for(one.pond.policy, 4))


def larger(one: Scene) -> None:
    one.pond.resize(plan_for(one.pond.policy, 60))


def shift(one: Scene) -> None:
    shift_uniformly(one.pond, ROPE, one.clock, 5)


def close(one: Scene) -> None:
    assert close_gaps(one.pond, ROPE, one.clock) > 0


def cut(one: Scene) -> None:
    one.pond.cut(one.pond.length - 4, 2)


def roll_back(one: Scene) -> None:
    one.pond.truncate(one.pond.length - 3)


def state(one: Scene) -> list[Any]:
    """Everything that lives in a pond, and its books."""
    pond = one.pond
    out: list[Any] = [vars(one.clock).copy(), pond.plan, pond.ledger.limit, pond.storage.ahead, pond.recent]
    out += [
        pond.compactions,
        pond.evicted,
        pond.storage.nbytes,
        pond.ledger.account("storage"),
        pond.ledger.account("dequantization buffer"),
    ]
    tensors = [pond.queries.rows]
    for layer in pond.layers:
        out += [layer.length, layer.capacity, {tensor.shape[1] for tensor in layer.tensors()}]
        tensors += [tensor[:, : layer.length] for tensor in layer.tensors()]
        if isinstance(layer, MixedPrecisionLayer):
            out += [layer.store.groups, layer.store.capacity]
            tensors += [tensor[:, : layer.store.groups] for tensor in layer.store.tensors()]
    if pond.host is not None:
        host = pond.host
        out += [host.ring, host.span, host._moved.tolist()]
        # What has left may be written over at any time.
        rows = [number % host._rows for number in range(host.ring.first, host.ring.end)]
        slots = [slot % host._slots for slot in range(host.ring.next - host.tokens, host.ring.next)]
        tensors += [host._table[rows], host._key_sums[:, :, rows], host._positions[slots], host._grid_positions[slots]]
        tensors += [host._keys[:, :, slots], host._values[:, :, slots]]
    return [*out, [tensor.clone() for tensor in tensors]]


def same(first: list[Any], second: list[Any]) -> bool:
    numbers = first[:-1] == second[:-1]
    return numbers and all(torch.equal(a, b) for a, b in zip(first[-1], second[-1], strict=True))


def twins(start: Scene, move: Callable[[Scene], None]) -> list[list[Any]]:
    """What the pond is before the move, after each of its transactions, and in the end."""
    other = copied(start)
    seen = [state(other)]
    carry_out = other.pond.carry_out

    def watched(what: Any) -> None:
        carry_out(what)
        seen.append(state(other))

    other.pond.carry_out = watched  # type: ignore[method-assign]
    move(other)
    assert not same(seen[0], state(other))
    return [*seen, state(other)]


class Lines:
    """Raises before the n-th line that runs in the watched files, or counts them."""

    def __init__(self, fault: BaseException | None = None, at: int = -1) -> None:
        self.fault, self.at, self.lines, self.names = fault, at, [], WATCHED

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self.names:
            return None
        return self.line

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            if self.fault is not None and len(self.lines) == self.at:
                self.at = -1
                raise self.fault
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


class Operators(TorchDispatchMode):
    """Fails at the n-th operator, as one does that gets no memory; for good, or once."""

    def __init__(self, at: int, *, for_good: bool) -> None:
        super().__init__()
        self.at, self.for_good, self.count = at, for_good, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at or (self.for_good and 0 < self.at <= self.count):
            raise torch.OutOfMemoryError("no memory, on purpose")
        return func(*args, **(kwargs or {}))


MOVES = {
    "compact": (compact, POLICIES),
    "smaller": (smaller, ("a layer each", "arena", "low bits")),
    "larger": (larger, ("a layer each", "arena", "low bits")),
    "close gaps": (close, ("a layer each", "low bits", "host", "merging")),
    "shift": (shift, ("arena", "low bits")),
    "cut": (cut, ("arena",)),
    "roll back": (roll_back, ("arena",)),
}
CASES = [(move, kind, True) for move, (_, kinds) in MOVES.items() for kind in kinds]
# Without the compiled kernels the moves go piece by piece.
CASES += [("compact", "a layer each", False), ("compact", "merging", False), ("close gaps", "low bits", False)]
SHARE = 6  # each case tries every sixth place, beginning with another one: most code is that of several cases


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.getfixturevalue("compiled"):
        monkeypatch.setattr(dispatch, "kernels_enabled", False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "compiled"), CASES)
def test_interrupted_at_any_line(name: str, kind: str, compiled: bool) -> None:
    move, start, offset = MOVES[name][0], scene(kind), CASES.index((name, kind, compiled))
    allowed = twins(start, move)
    counted = Lines()
    other = copied(start)
    with counted.watching():
        move(other)
    # Every line that ran, at its first run and at its last.
    first = {line: at for at, line in reversed(list(enumerate(counted.lines)))}
    last = {line: at for at, line in enumerate(counted.lines)}
    for number, at in list(enumerate(sorted({*first.values(), *last.values()})))[offset % SHARE :: SHARE]:
        one = copied(start)
        fault = FAULTS[number // SHARE % len(FAULTS)]("on purpose")
        caught: BaseException | None = None
        try:
            with Lines(fault, at).watching():
                move(one)
        except (Exception, KeyboardInterrupt) as error:
            caught = error
        where = f"{fault!r} in line {counted.lines[at]}"
        assert caught is not None, f"{where} was swallowed"
        assert fault in (caught, caught.__cause__), f"{where} became {caught!r}"
        now = state(one)
        assert any(same(now, twin) for twin in allowed), f"{where} leaves the pond between two states"
        assert not one.pond.moving


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "compiled"), CASES)
def test_no_memory_at_any_operator(name: str, kind: str, compiled: bool) -> None:
    move, start, offset = MOVES[name][0], scene(kind), CASES.index((name, kind, compiled))
    allowed = twins(start, move)
    other = copied(start)
    with Operators(0, for_good=False) as counted:
        move(other)
    for number, at in enumerate(range(1 + offset, counted.count + 1, max(1, counted.count // 12))):
        one = copied(start)
        with pytest.raises((torch.OutOfMemoryError, BudgetError)), Operators(at, for_good=number % 2 == 0):
            move(one)
        if one.pond.moving:
            with Operators(1, for_good=True), pytest.raises(MillpondError, match="every call tries again"):
                one.pond.overrun(1)
        one.pond.finish()  # as every call does
        now = state(one)
        assert any(same(now, twin) for twin in allowed)
