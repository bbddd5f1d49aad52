"""The low-bit tier in a pond: what is packed, what is forgotten, and that nothing else changes."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.cache.plan import Plan
from millpond.cache.rerotation import close_gaps, shift_uniformly
from millpond.cache.storage.mixed_precision_layer import stream_order
from millpond.errors import PolicyError
from millpond.kv_quantization.quantizer import KVQuantizer
from millpond.kv_quantization.tier import QuantizedTier
from millpond.memory.geometry import Geometry
from millpond.ops import dispatch
from millpond.policies.base import TEXT, Policy, View
from millpond.policies.methods.mikv import MiKV
from millpond.positions import Clock
from tests.cache.test_pond import copied
from tests.cache.test_rerotation import ROPE, Stream, roped
from tests.cache.text_model import Scattered
from tests.session.measure import transient_peak

CPU = torch.device("cpu")


class TieredStream(Stream):
    """A stream of known keys behind the tier."""

    def __init__(self, policy: Policy, layers: int, slots: int = 220) -> None:
        self.geometry = Geometry(layers, 2, 16, torch.float32, axes=3)
        self.pond = Pond(self.geometry, self.plan(policy, slots * self.geometry.bytes_per_token), policy, CPU)
        self.clock, self.random, self.time = Clock(step=4), torch.Generator().manual_seed(0), 0
        self.raw: dict[bytes, Tensor] = {}
        self.append(self.clock.text(3).expand(3, -1), torch.full((3, 2), TEXT, dtype=torch.int16), prompt=True)

    def plan(self, policy: Policy, budget: int) -> Plan:
        return make_plan(budget, self.geometry, policy, prompt_tokens=3, group_tokens=6, reserve_tokens=5)

    def values(self) -> tuple[Tensor, Tensor]:
        """Every value that went in, and its key before rotation."""
        values = [torch.frombuffer(bytearray(name), dtype=torch.float32) for name in self.raw]
        return torch.stack(values), torch.stack(list(self.raw.values()))

    def worst(self) -> float:
        """As there, but a packed token is known by the value nearest to its own."""
        worst = super().worst()
        values, raw = self.values()
        for layer in self.pond.layers:
            quantized_store = layer.store
            for head in range(2):
                got = torch.empty(2, quantized_store.tokens, 16)
                quantized_store.read(head, 0, quantized_store.tokens, got[0], got[1])
                nearest = torch.cdist(got[1], values).argmin(dim=1)
                want = roped(raw[nearest], quantized_store.live("positions")[head])
                worst = max(worst, float((got[0].double() - want).abs().max()))
        return worst


def tiered(bits: int = 8, layers: int = 2, slots: int = 220, base: Policy | None = None) -> TieredStream:
    return TieredStream(MiKV(bits=bits, group=8, full_share=0.4, base=base or Scattered()), layers, slots)


def state(pond: Pond) -> list[Tensor]:
    """Copies of everything live."""
    out = []
    for layer in pond.layers:
        out += [tensor[:, : layer.length].clone() for tensor in layer.tensors()]
        out += [tensor[:, : layer.store.groups].clone() for tensor in layer.store.tensors()]
    return out


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_is_in_full_then_packed_then_gone_and_every_number_is_its_own() -> None:
    stream = tiered()
    seen_packed = set()
    for frame in range(60):
        stream.frame()
        pond = stream.pond
        assert pond.ledger.held <= pond.plan.budget
        assert pond.memory_tokens == pond.full_precision_tokens + pond.quantized_tokens
        assert pond.memory_tokens + pond.evicted == 6 * (frame + 1)  # packing forgets nothing
        for layer in pond.layers:
            for head in range(2):
                full, quantized = (
                    layer.positions[head, : layer.length, :],
                    layer.store.live("positions")[head],
                )
                both = [tuple(row) for row in torch.cat([full, quantized]).tolist()]
                assert len(set(both)) == len(both), "a token is in one tier only"
                latest = {tuple(row) for row in full[-6:].tolist()}
                assert {t for t, *_ in latest} == {max(t for t, *_ in both)}, "the latest frame is in full"
                seen_packed |= set(quantized[:, 0].tolist())
    assert pond.quantized_tokens == pond.plan.quantized_tokens
    assert pond.evicted > 100
    assert len(seen_packed) > 40
    assert stream.worst() <= 0.03  # 8 bits of keys up to 4


def test_a_group_is_written_once() -> None:
    """What a group says of its tokens never changes while it lives: no drift from pass to pass."""
    stream = tiered(bits=2)
    first: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}
    lived = 0
    for _ in range(60):
        stream.frame()
        for index, layer in enumerate(stream.pond.layers):
            quantized_store = layer.store
            for head in range(2):
                for group in range(quantized_store.groups):
                    name = index, head, tuple(quantized_store.positions[head, group].flatten().tolist())
                    codes = torch.cat(
                        [quantized_store.key_codes[head, group], quantized_store.value_codes[head, group]]
                    )
                    lived += name in first
                    assert torch.equal(first.setdefault(name, codes.clone()), codes)
    assert lived > 100


def test_transformers_sees_packed_tokens_in_front_of_full_ones() -> None:
    stream = tiered()
    for _ in range(30):
        stream.frame()
    pond = stream.pond
    quantized, length = pond.quantized_tokens, pond.length
    assert quantized > 0
    assert pond.get_seq_length() == quantized + length
    assert pond.get_mask_sizes(2, 0) == (quantized + length + 2, 0)
    pond.write_metadata(
        torch.zeros(2, dtype=torch.int64), torch.full((2, 2), TEXT, dtype=torch.int16), torch.zeros(3, 2)
    )
    for index, layer in enumerate(pond.layers):
        new = torch.randn(2, 1, 2, 2, 16)
        keys, values = pond.update(new[0], new[1], index)
        assert keys.shape == values.shape == (1, 2, quantized + length + 2, 16)
        assert torch.equal(keys[:, :, -2:], new[0])
        assert torch.equal(keys[:, :, quantized:-2], layer.keys[:, :, :length])
        assert torch.equal(values[:, :, quantized:-2], layer.values[:, :, :length])
        for head in range(2):
            expected = torch.empty(quantized, 16)
            layer.store.read(head, 0, quantized, expected, None)
            assert torch.equal(keys[0, head, :quantized], expected)
            layer.store.read(head, 0, quantized, None, expected)
            assert torch.equal(values[0, head, :quantized], expected)


def test_a_rolled_back_turn_leaves_both_tiers_as_they_were() -> None:
    stream = tiered()
    for _ in range(30):
        stream.frame()
    pond, before = stream.pond, state(stream.pond)
    length = pond.length
    pond.write_metadata(
        torch.zeros(4, dtype=torch.int64), torch.full((4, 2), TEXT, dtype=torch.int16), torch.zeros(3, 4)
    )
    for index in range(2):
        pond.update(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16), index)
    pond.truncate(length)
    assert same(before, state(pond))


@dataclass(frozen=True)
class Spy(Policy):
    """Keeps the newest; notes what it is shown."""

    name: ClassVar[str] = "spy"
    source: ClassVar[str] = "a test"
    seen: tuple[list[tuple[int, View]], ...] = ()

    def keep(self, view: View, slots: int) -> Tensor:
        names = "keys", "values", "time_us", "grid_position", "protected"
        copies = {name: getattr(view, name).clone() for name in names}
        self.seen[0].append((view.keys.data_ptr(), replace(view, **copies)))
        rows = [
            torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0].flip(0)])[:slots].sort().values
            for row in view.protected
        ]
        return torch.stack(rows)


def test_the_policy_sees_packed_and_protected_tokens_in_stream_order() -> None:
    views: list[tuple[int, View]] = []
    stream = tiered(base=Spy(seen=(views,)), layers=1)
    for at in range(60):
        stream.frame()
        if at == 20:
            stream.text()
    dequantization_buffer = stream.pond.storage.buffer.keys.data_ptr()
    shown = [view for at, view in views if at == dequantization_buffer]
    assert len(shown) > 5
    values, _ = stream.values()
    for view in shown:
        assert bool((view.time_us[:, 1:] >= view.time_us[:, :-1]).all())
        assert int(view.protected.sum()) > 0
        assert int((~view.protected).sum()) == 2 * stream.pond.plan.quantized_tokens
        for head in range(2):
            for key, value, protected in zip(view.keys[head], view.values[head], view.protected[head], strict=True):
                error = (values - value).abs().amax(1).min()
                assert float(error) == 0 if protected else float(error) < 0.02
                assert bool(key.isfinite().all())


def test_the_groups_with_the_most_chosen_tokens_stay() -> None:
    """Recency by tokens must be recency by groups."""
    views: list[tuple[int, View]] = []
    stream = tiered(base=Spy(seen=(views,)), layers=1)
    for _ in range(60):
        stream.frame()
    quantized_store = stream.pond.layers[0].store
    for head in range(2):
        oldest = int(quantized_store.positions[head, : quantized_store.groups, :, 0].min())
        newest = int(stream.pond.layers[0].positions[head, : stream.pond.length, 0].max())
        # Frames of 6 tokens, 4 positions apart: what is remembered reaches back no further than its size, and a group.
        assert newest - oldest <= 4 * ((stream.pond.memory_tokens + 16) // 6 + 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reanchoring_repeats_without_running_away(bits: int) -> None:
    """Turning back and forth packs anew each time: half a step of error each, which must add up no faster than that."""
    stream = tiered(bits=bits, layers=1)
    for _ in range(40):
        stream.frame()
    once = stream.worst()
    for turn in range(20):
        shift_uniformly(stream.pond, ROPE, stream.clock, 211 if turn % 2 else -89)
    steps = 9 / (2**bits - 1)  # keys span at most 9
    assert stream.worst() <= once + 20 * 0.75 * steps


def test_eight_bits_survive_many_closings_of_gaps() -> None:
    stream = tiered(layers=1)
    closed = 0
    for at in range(120):
        stream.frame(after=1 + at % 3)
        if at % 15 == 14:
            closed += close_gaps(stream.pond, ROPE, stream.clock)
            for head in range(2):
                positions, grid_position = stream.pond.layers[0].in_order(head)
                assert bool((positions[1:, 0] >= positions[:-1, 0]).all())
                assert grid_position.shape[0] == stream.pond.layers[0].get_seq_length()
    assert closed > 0
    assert stream.worst() <= 0.2


def test_fork_is_a_copy_and_both_go_on_alone() -> None:
    stream = tiered()
    for _ in range(30):
        stream.frame()
    other = copied(stream.pond)
    before = state(other)
    assert same(state(stream.pond), before)
    mine = {
        t.untyped_storage().data_ptr()
        for layer in stream.pond.layers
        for t in (*layer.tensors(), *layer.store.tensors())
    }
    for _ in range(10):
        stream.frame()
    assert same(state(other), before)
    assert mine.isdisjoint(
        t.untyped_storage().data_ptr() for copy in other.layers for t in (*copy.tensors(), *copy.store.tensors())
    )
    assert other.storage.buffer is not stream.pond.storage.buffer


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.2, 3.0])
def test_resize_keeps_what_it_can_and_both_caps(factor: float) -> None:
    stream = tiered()
    for _ in range(40):
        stream.frame()
    pond, before = stream.pond, state(stream.pond)
    budget = int(pond.plan.budget * factor)
    plan = stream.plan(pond.policy, budget)
    pond.resize(plan)
    assert pond.ledger.limit == budget
    assert pond.ledger.held <= budget
    assert pond.ledger.account("storage") == pond.storage.nbytes
    assert pond.ledger.account("dequantization buffer") == plan.dequantization_bytes
    assert pond.quantized_tokens <= plan.quantized_tokens
    assert stream.worst() <= 0.03
    if factor > 1:
        assert same(before, state(pond))
    for _ in range(40):
        stream.frame()
        assert pond.ledger.held <= budget
    assert stream.worst() <= 0.03


@dataclass(frozen=True)
class Failing(Scattered):
    """Breaks, once armed, at one layer: when it chooses among full tokens, or among packed ones."""

    name: ClassVar[str] = "failing"
    layer: int = 1
    quantized: bool = False
    armed: tuple[list[int], ...] = ()

    def keep(self, view: View, slots: int) -> Tensor:
        dequantization_buffer = self.armed[0]
        if (
            dequantization_buffer
            and view.layer == self.layer
            and (view.keys.data_ptr() == dequantization_buffer[0]) == self.quantized
        ):
            raise PolicyError("on purpose")
        return super().keep(view, slots)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_policy_that_fails_leaves_both_tiers_whole(layer: int, quantized: bool) -> None:
    armed: list[int] = []
    stream = tiered(base=Failing(layer=layer, quantized=quantized, armed=(armed,)))
    for _ in range(40):
        stream.frame()
    before = state(stream.pond)
    armed.append(stream.pond.storage.buffer.keys.data_ptr())
    with pytest.raises(PolicyError, match="on purpose"):
        stream.pond.compact(stream.pond.full_precision_tokens - 1)
    if layer == 0:
        assert same(before, state(stream.pond))
    lengths = {(each.length, each.store.groups) for each in stream.pond.layers}
    assert len(lengths) == 1
    assert stream.worst() <= 0.03
    armed.clear()
    for _ in range(10):
        stream.frame()
    assert stream.worst() <= 0.03


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("accumulated_attention", [False, True])
def test_the_plans_bytes_are_those_allocated(bits: int, axes: int, accumulated_attention: bool) -> None:
    geometry = Geometry(3, 2, 24, torch.bfloat16, axes=axes, accumulated_attention=accumulated_attention)
    policy = MiKV(bits=bits, base="h2o" if accumulated_attention else Scattered(), group=8)
    plan = make_plan(400_000, geometry, policy, prompt_tokens=5, group_tokens=12)
    pond = Pond(geometry, plan, policy, CPU)
    assert pond.storage.nbytes == plan.slots * plan.bytes_per_token + plan.quantized_bytes
    assert pond.storage.buffer.keys.nbytes + pond.storage.buffer.values.nbytes == plan.dequantization_bytes
    assert plan.total_bytes <= 400_000
    assert plan.quantized_tokens % 8 == 0
    share = plan.memory_tokens / (plan.memory_tokens + plan.quantized_tokens)
    assert share == pytest.approx(0.2, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_scratch_of_every_pass_is_within_the_plan(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(dispatch, "kernels_enabled", False)
    stream = tiered(bits=3, slots=300)
    for _ in range(70):
        stream.frame()
    pond = stream.pond
    assert pond.quantized_tokens == pond.plan.quantized_tokens
    most = pond.plan.scratch_bytes
    assert 0 < transient_peak(lambda: pond.compact(pond.full_precision_tokens - 9)) <= most
    assert 0 < transient_peak(lambda: shift_uniformly(stream.pond, ROPE, stream.clock, 50)) <= most
    assert 0 < transient_peak(lambda: close_gaps(stream.pond, ROPE, stream.clock)) <= most
    if compiled:
        return  # the compiled reading takes nothing
    layer = pond.layers[0]
    new = torch.randn(1, 2, 1, 16)
    assert 0 < transient_peak(lambda: layer.update(new, new)) <= pond.storage.buffer.quantization_bytes


def test_order_is_that_of_the_stream() -> None:
    time = torch.tensor([7, 7, -3, 7, 8])
    grid_position = torch.tensor([[0, 1], [1, 0], [-1, -1], [0, 0], [-1, -1]], dtype=torch.int16)
    assert stream_order(time, grid_position).tolist() == [2, 3, 0, 1, 4]


def test_what_cannot_be_packed_is_refused() -> None:
    for bad in ({"bits": 5}, {"full_share": 0.0}, {"full_share": 1.0}, {"base": "full"}, {"base": "nonesuch"}):
        with pytest.raises(PolicyError):
            MiKV(**bad)
    with pytest.raises(PolicyError):
        MiKV(base="infinipot-v-released")
    with pytest.raises(PolicyError):
        MiKV(base=MiKV())
    with pytest.raises(PolicyError):
        QuantizedTier(KVQuantizer(4), 2.0)


def test_a_shift_moves_packed_tokens_with_the_others_and_live_bytes_count_both() -> None:
    stream = tiered()
    for _ in range(30):
        stream.frame()
    pond = stream.pond
    before = [
        (layer.positions[:, : layer.length].clone(), layer.store.live("positions").clone()) for layer in pond.layers
    ]
    shift_uniformly(pond, ROPE, stream.clock, 37)
    for layer, (full, quantized) in zip(pond.layers, before, strict=True):
        assert torch.equal(layer.positions[:, : layer.length], full - 37)
        assert torch.equal(layer.store.live("positions"), quantized - 37)
    assert stream.worst() <= 0.06  # two roundings
    assert pond.storage.live_bytes == sum(tensor.nbytes for tensor in state(pond))


def test_as_many_packed_groups_stay_as_were_asked_for() -> None:
    stream = tiered()
    for _ in range(30):
        stream.frame()
    groups = stream.pond.quantized_tokens // 8
    assert groups > 5
    for left in (groups, 5, 1):
        stream.pond.forget_quantized(left)
        assert [layer.store.groups for layer in stream.pond.layers] == [left, left]
        assert stream.pond.quantized_tokens == 8 * left
    assert stream.worst() <= 0.03
