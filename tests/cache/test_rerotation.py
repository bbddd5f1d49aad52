"""Re-anchoring: stored keys equal keys roped at their new positions, distances behave as promised, nothing drifts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.rerotation import close_gaps, shift_uniformly, stay_in_range
from millpond.memory.geometry import Geometry
from millpond.policies.base import TEXT
from millpond.positions import Clock, Rope
from tests.cache.text_model import Scattered

WIDTH = 16
ROPE = Rope(
    inv_freq=1.0 / (10_000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)),
    axis=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
    limit=600,
)
ROWS, COLS = 2, 3


def roped(raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Independent rotary embedding in float64: raw [n, D], positions [n, 3]."""
    angle = positions.double()[:, ROPE.axis] * ROPE.inv_freq.double()
    turn = torch.polar(torch.ones_like(angle), angle)
    half = WIDTH // 2
    out = torch.complex(raw[:, :half].double(), raw[:, half:].double()) * turn
    return torch.cat([out.real, out.imag], dim=1)


class Stream:
    """A pond filled with keys that are known before rotation."""

    def __init__(self, layers: int = 2, slots: int = 90, seed: int = 0, step: int = 4) -> None:
        self.geometry = Geometry(layers, 2, WIDTH, torch.float32, axes=3)
        policy = Scattered()
        plan = make_plan(
            slots * self.geometry.bytes_per_token,
            self.geometry,
            policy,
            prompt_tokens=3,
            group_tokens=ROWS * COLS,
            reserve_tokens=5,
        )
        self.pond = Pond(self.geometry, plan, policy, torch.device("cpu"))
        self.clock = Clock(step=step)
        self.random = torch.Generator().manual_seed(seed)
        self.raw: dict[bytes, torch.Tensor] = {}
        self.time = 0
        self.append(self.clock.text(3).expand(3, -1), torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)

    def append(self, positions: torch.Tensor, grid_position: torch.Tensor, *, prompt: bool = False) -> None:
        count = grid_position.shape[0]
        self.pond.ensure_capacity(count)
        self.time += 1
        times = torch.full((count,), self.time)
        self.pond.write_metadata(times, grid_position, positions)
        for index in range(self.geometry.layers):
            raw = torch.randn(2, count, WIDTH, generator=self.random)
            keys = torch.stack([roped(raw[head], positions.T).float() for head in range(2)])
            values = torch.randn(1, 2, count, WIDTH, generator=self.random)
            for head in range(2):
                for n in range(count):
                    self.raw[values[0, head, n].numpy().tobytes()] = raw[head, n]
            self.pond.update(keys[None], values, index)
        if not prompt:
            self.pond.commit(times, grid_position)

    def frame(self, after: int = 1) -> None:
        """A frame `after` steps of the clock later."""
        clock = self.clock
        base = clock.open_segment(0)
        self.at = getattr(self, "at", -1) + after if clock.next != base else 0
        rows, cols = torch.meshgrid(torch.arange(ROWS), torch.arange(COLS), indexing="ij")
        grid_position = torch.stack([rows.flatten(), cols.flatten()], 1).to(torch.int16)
        time = torch.full((ROWS * COLS,), clock.origin + self.at * clock.step)
        positions = torch.stack([time, base + rows.flatten(), base + cols.flatten()])
        clock.next = max(clock.next, int(positions.max()) + 1)
        self.append(positions, grid_position)

    def text(self, count: int = 4) -> None:
        self.append(self.clock.text(count).expand(3, -1), torch.full((count, 2), TEXT, dtype=torch.int16))

    def worst(self) -> float:
        """Largest difference between a stored key and its raw key roped at its stored position."""
        worst = 0.0
        for layer in self.pond.layers:
            for head in range(2):
                n = layer.length
                raw = torch.stack([self.raw[v.numpy().tobytes()] for v in layer.values[0, head, :n]])
                want = roped(raw, layer.positions[head, :n])
                worst = max(worst, float((layer.keys[0, head, :n].double() - want).abs().max()))
        return worst


def test_a_uniform_shift_moves_every_key_and_leaves_differences_and_scores() -> None:
    stream = Stream()
    for _ in range(40):
        stream.frame()
    query = torch.randn(1, WIDTH)
    layer = stream.pond.layers[0]
    before = layer.positions.clone()
    at = stream.clock.next
    scores = layer.keys[0, 0, : layer.length].double() @ roped(query, torch.full((1, 3), at))[0]
    shift_uniformly(stream.pond, ROPE, stream.clock, 137)
    assert stream.clock.next == at - 137
    assert torch.equal(layer.positions[:, : layer.length], before[:, : layer.length] - 137)
    after = layer.keys[0, 0, : layer.length].double() @ roped(query, torch.full((1, 3), at - 137))[0]
    assert torch.allclose(scores, after, atol=1e-4)
    assert stream.worst() <= 1e-5


def test_a_hundred_reanchorings_do_not_drift() -> None:
    stream = Stream(layers=1)
    for _ in range(10):
        stream.frame()
    for turn in range(100):
        shift_uniformly(stream.pond, ROPE, stream.clock, 211 if turn % 2 else -89)
    assert stream.worst() <= 2e-5  # one float32 rounding a turn, of keys up to 4: a random walk, no drift


def test_closing_gaps_by_hand() -> None:
    """One head, told by hand: the prompt at 0..2, frames at 3, 43, 47 (step 4): the gap of 40 closes to 4."""
    stream = Stream(layers=1, slots=60)
    stream.frame()
    stream.frame(after=10)
    stream.frame()
    assert stream.clock.next == 48
    moved = close_gaps(stream.pond, ROPE, stream.clock)
    # The first frame reaches 5 on the width axis; 43 may come down to 5 + 4 = 9, so 34 positions close.
    assert moved == 34
    assert stream.clock.next == 14
    layer = stream.pond.layers[0]
    assert layer.positions[0, : layer.length, 0].tolist() == [0, 1, 2] + [3] * 6 + [9] * 6 + [13] * 6
    assert layer.positions[0, 3:9, 1:].tolist() == layer.positions[0, 9:15, 1:].tolist()  # grids stay where they were
    assert stream.worst() <= 1e-5
    stream.frame()
    assert layer.positions[0, layer.length - 1, 0] == 17


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(st.one_of(st.integers(1, 30), st.just("text"), st.just("close")), min_size=3, max_size=40),
    seed=st.integers(0, 5),
)
def test_closing_gaps_keeps_order_grids_agreement_and_exact_keys(script: list, seed: int) -> None:
    stream = Stream(seed=seed)
    for what in [*script, "close"]:
        if what == "text":
            stream.text()
        elif what == "close":
            before = [layer.positions[:, : layer.length].clone() for layer in stream.pond.layers]
            newest = stream.clock.next
            moved = close_gaps(stream.pond, ROPE, stream.clock)
            assert 0 <= moved <= newest
            assert stream.clock.next == newest - moved
            for layer, old in zip(stream.pond.layers, before, strict=True):
                new = layer.positions[:, : layer.length]
                assert torch.equal(new[:, :3], old[:, :3]), "the prompt stays"
                shift = old - new
                assert bool((shift >= 0).all())
                assert bool((shift[:, 1:, 0] >= shift[:, :-1, 0]).all()), "older tokens never overtake newer ones"
                assert bool((shift[:, -1, 0] == moved).all()), "all heads agree on the end"
                assert int(new.max()) < stream.clock.next
                text = layer.grid_position[:, : layer.length, 0] == TEXT
                assert bool((new[text] == new[text][:, :1]).all()), "text keeps one position on all axes"
            assert stream.worst() <= 2e-5
        else:
            stream.frame(after=int(what))
    if stream.clock.base is not None and stream.pond.length > 3:
        layer = stream.pond.layers[0]
        newest = layer.positions[:, layer.length - 1]
        assert bool((newest == newest[:1]).all()), "the newest frame lies at one place in every head"


def test_contiguous_positions_stay_below_the_memory_times_the_step_for_ever() -> None:
    stream = Stream()
    widest = 0
    for _ in range(600):
        if stream.clock.next > 400:
            close_gaps(stream.pond, ROPE, stream.clock)
            widest = max(widest, stream.clock.next)
        stream.frame()
    assert stream.pond.compactions > 50
    assert 0 < widest <= stream.pond.plan.slots * stream.clock.step
    assert stream.worst() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_cost_one_rounding_a_turn(dtype: torch.dtype) -> None:
    keys = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    delta = torch.full((50, 3), -1234)
    want = roped(keys.double(), delta)
    turned = keys.clone()
    ROPE.rotate_(turned, delta)
    assert float((turned.double() - want).abs().max()) <= torch.finfo(dtype).eps * 4


def test_the_range_is_left_at_its_end_and_the_look_ahead_is_at_most_a_quarter() -> None:
    def moved(at: int, tokens: int, *, frames: int = 1, closing: bool = False) -> tuple[int, Stream]:
        stream = Stream(layers=1)
        for _ in range(frames):
            stream.frame()
        shift_uniformly(stream.pond, ROPE, stream.clock, stream.clock.next - at)
        return stay_in_range(stream.pond, ROPE, stream.clock, tokens, closing=closing), stream

    limit = ROPE.limit
    assert moved(limit - 7, 7)[0] == 0
    by, stream = moved(limit - 6, 7)
    assert by == limit - 6 - limit // 2
    assert stream.clock.next == limit // 2, "true distances stay, in the first half"
    assert moved(limit - limit // 4, 10**6)[0] == 0
    assert moved(limit - limit // 4 + 1, 10**6)[0] == limit // 4 + 1
    # Behind a closing that made room enough, nothing is shifted.
    closed = Stream(layers=1, slots=60)
    closed.frame()
    closed.frame(after=(limit - 10) // closed.clock.step)
    before = closed.clock.next
    assert 0 < stay_in_range(closed.pond, ROPE, closed.clock, 40, closing=True) == before - closed.clock.next
    assert closed.clock.next < 20
    assert closed.worst() <= 1e-4


def test_an_empty_memory_stays_where_it_is() -> None:
    stream = Stream(layers=1)
    stream.pond.truncate(0)
    stream.clock.next = 10 * ROPE.limit
    assert stay_in_range(stream.pond, ROPE, stream.clock, 5, closing=True) == 0
    assert stream.clock.next == 10 * ROPE.limit
