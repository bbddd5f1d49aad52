"""The low-bit tier under a session: answers, the cap in every phase, scorers of every kind, fork and resize."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from millpond import PondCache, Session, policies
from millpond.cache.consumers import make_plan
from millpond.cache.plan import Plan
from millpond.memory.geometry import Geometry
from millpond.policies.base import Policy
from millpond.policies.methods.hermes import HERMES
from tests.cache.text_model import text_model
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes, transient_peak
from tests.session.test_cap import QUESTION, Watched


def budget_for(family: object, tokens: int = 250) -> int:
    return tokens * family.geometry.bytes_per_token + 150_000  # type: ignore[attr-defined]


def hidden(session: Session) -> torch.Tensor:
    """Logits of a question behind the memory, float32 [n, vocabulary]; the memory is as before."""
    runner = session._runner
    mark, clock = runner.pond.length, replace(runner.clock)
    with torch.no_grad():
        logits = session.family.logits(runner.run(session.family.question(QUESTION, after_video=True)))
    runner.roll_back(mark, clock)
    return logits.float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "base", "bits"),
    nightly(
        [("qwen2_5_vl", "infinipot-v", 4), ("qwen2_5_vl", "h2o", 3), ("llava_onevision", HERMES(deep=0), 2)],
        but=[("qwen2_5_vl", "h2o", 3)],
    ),
)
def test_no_phase_ever_passes_the_budget(
    name: str, base: str | Policy, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, dtype=torch.bfloat16 if base == "infinipot-v" else torch.float32)
    budget = budget_for(family, 200)
    session = Session(family, budget=budget, policy=policies.get("mikv", bits=bits, group=8, full_share=0.4, base=base))
    watched = Watched(session, monkeypatch)
    session.feed(list(moving(51)))
    assert session.usage.evicted_tokens > 0, "the tier overflowed too"
    watched.look()
    session.ask(QUESTION, max_new_tokens=4)
    session.ask(QUESTION, max_new_tokens=10_000, remember=True)
    session.feed(list(moving(7, start=40)))
    fork = session.fork()
    assert held_bytes(fork) <= fork._runner.pond.ledger.held <= budget
    del fork
    session.resize(budget * 3 // 2)
    session.feed(list(moving(20, start=50)))
    session.resize(budget)
    session.feed(list(moving(6, start=80)))
    session.ask(QUESTION, max_new_tokens=3)
    usage = session.usage
    assert usage.peak_bytes <= budget * 3 // 2
    assert held_bytes(session) <= usage.allocated_bytes <= budget
    assert len(watched.scratch) > 3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_eight_bits_answer_like_full_precision(name: str) -> None:
    """Against the same tokens unpacked: none is forgotten yet."""
    family = tiny(name)
    session, coarse, whole = (
        Session(family, budget=None if policy == "full" else budget_for(family, 600), policy=policy)
        for policy in ("mikv:bits=8:group=8:full_share=0.4", "mikv:bits=2:group=8:full_share=0.4", "full")
    )
    ponds = []
    for frame in moving(80):
        for each in (session, coarse, whole):
            each.feed([frame])
        ponds = [each._runner.pond for each in (session, coarse)]
        if min(pond.quantized_tokens for pond in ponds) >= 40:
            break
    assert min(pond.quantized_tokens for pond in ponds) >= 40
    assert all(pond.evicted == 0 for pond in ponds)
    assert session.usage.memory_tokens == coarse.usage.memory_tokens == whole.usage.memory_tokens
    reference, logits = hidden(whole), hidden(session)
    spread = float(reference.std())
    assert float((logits - reference).abs().max()) <= 0.02 * spread
    assert float((hidden(coarse) - reference).abs().max()) > float((logits - reference).abs().max())


def test_asking_leaves_the_memory_bit_identical_and_forks_agree() -> None:
    family = tiny("qwen2_5_vl")
    session, twin = (Session(family, budget=budget_for(family), policy="mikv:group=8:full_share=0.4") for _ in range(2))
    for each in (session, twin):
        each.feed(list(moving(70)))

    def snapshot(session: Session) -> list[torch.Tensor]:
        pond = session._runner.pond
        full = [t[:, : layer.length].clone() for layer in pond.layers for t in layer.tensors()]
        return full + [t[:, : layer.store.groups].clone() for layer in pond.layers for t in layer.store.tensors()]

    before = snapshot(session)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(twin), strict=True))
    first = session.ask(QUESTION, max_new_tokens=8)
    fork = session.fork()
    second = fork.ask(QUESTION, max_new_tokens=8)
    assert first.token_ids == second.token_ids
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(session), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(fork), strict=True))
    session.feed(list(moving(12, start=40)))
    fork.feed(list(moving(12, start=40)))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(session), snapshot(fork), strict=True))


def test_memory_tells_of_packed_tokens_and_the_latest_frame_is_in_full() -> None:
    family = tiny("qwen2_5_vl")
    session = Session(family, budget=budget_for(family), policy="mikv:group=8:full_share=0.4")
    session.feed(list(moving(71)))
    pond = session._runner.pond
    latest = pond.recent.groups[-1]
    for layer in session.memory():
        assert (
            layer.seconds.shape[1] == session.usage.memory_tokens == pond.quantized_tokens + pond.full_precision_tokens
        )
        assert layer.quantized == pond.quantized_tokens > 0
        full = layer.seconds[:, layer.quantized :]
        assert bool((np.diff(full, axis=1) >= 0).all())
        assert bool((np.isclose(full, latest[0] / 1e6).sum(axis=1) == latest[1]).all())
        assert not np.isclose(layer.seconds[:, : layer.quantized], latest[0] / 1e6).any()
    assert session.usage.live_bytes <= session.usage.allocated_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit", "base", "positions"),
    nightly(
        [
            ("qwen2_5_vl", 120, "infinipot-v", "contiguous"),
            ("qwen2_5_vl", 120, "h2o", "absolute"),
            ("llava_onevision", 700, "recent", "contiguous"),
        ],
        but=[("qwen2_5_vl", 120, "h2o", "absolute")],
    ),
)
def test_a_stream_past_the_trained_range(
    name: str, limit: int, base: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, max_position_embeddings=limit)
    budget = budget_for(family)
    session = Session(family, budget=budget, policy=f"mikv:group=8:full_share=0.4:base={base}", positions=positions)  # type: ignore[arg-type]
    watched = Watched(session, monkeypatch)
    import millpond.cache.rerotation as module

    for moved in ("close_gaps", "shift_uniformly"):
        original = getattr(module, moved)

        def measured(*args: object, original: object = original) -> object:
            result: list[object] = []
            peak = transient_peak(lambda: result.append(original(*args)))  # type: ignore[operator]
            watched.note(held_bytes(session) + peak)
            assert peak <= session.plan.scratch_bytes
            return result[0]

        monkeypatch.setattr(module, moved, measured)
    session.feed(list(moving(80, fps=1)))
    assert session.usage.reanchorings >= 2
    assert session._runner.pond.quantized_tokens > 0
    session.ask(QUESTION, max_new_tokens=3)


def test_sums_of_packed_tokens_go_on_growing() -> None:
    family = tiny("qwen2_5_vl")
    session = Session(family, budget=budget_for(family), policy="mikv:group=8:full_share=0.4:base=h2o")
    session.feed(list(moving(60)))
    layer = session._runner.pond.layers[0]
    session._runner.pond.compact(session._runner.pond.full_precision_tokens - 1)
    live = layer.store.groups
    held = {
        tuple(row.flatten().tolist()): s
        for row, s in zip(
            layer.store.positions[0, :live],
            layer.store.accumulated_attention[0, :live].clone(),
            strict=True,
        )
    }
    session.feed(list(moving(4, start=31)))
    grown = 0
    for row, accumulated_attention in zip(
        layer.store.positions[0, :live], layer.store.accumulated_attention[0, :live], strict=True
    ):
        earlier = held.get(tuple(row.flatten().tolist()))
        if earlier is not None:
            assert bool((accumulated_attention >= earlier).all())
            grown += int((accumulated_attention > earlier).sum())
    assert grown > 0


def test_generate_with_a_cache_of_two_tiers() -> None:
    model = text_model()
    geometry = Geometry.from_config(model.config, model.dtype)
    cache = PondCache(model, 300 * geometry.bytes_per_token, "mikv:bits=8:group=8:full_share=0.4:base=recent")
    ids = torch.randint(0, 97, (1, 3 * cache.headroom), generator=torch.Generator().manual_seed(1))
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=300, do_sample=False, prefill_chunk_size=cache.headroom
    )
    assert out.shape[1] == ids.shape[1] + 300
    assert cache.quantized_tokens == cache.plan.quantized_tokens
    assert cache.evicted > 0
    assert cache.ledger.peak <= cache.plan.budget
    cache.reset()
    assert cache.quantized_tokens == cache.get_seq_length() == 0
    again = model.generate(
        ids, past_key_values=cache, max_new_tokens=9, do_sample=False, prefill_chunk_size=cache.headroom
    )
    assert torch.equal(again, out[:, : again.shape[1]])


def test_an_admission_thins_what_is_packed() -> None:
    family = tiny("qwen2_5_vl")
    session = Session(family, budget=budget_for(family), policy="mikv:group=8:full_share=0.4", admission="curvestream")
    session.feed(list(moving(90)))
    usage = session.usage
    assert usage.frames_skipped + usage.frames_reduced > 0
    assert session._runner.pond.quantized_tokens > 0
    assert held_bytes(session) <= usage.allocated_bytes <= usage.peak_bytes <= session.plan.budget
    session.ask(QUESTION, max_new_tokens=3)


def qwen2_vl_7b(policy: str, budget: int = 2 << 30) -> Plan:
    geometry = Geometry(28, 4, 128, torch.bfloat16, axes=3, kv_groups=7)
    return make_plan(budget, geometry, policies.read(policy), prompt_tokens=16, group_tokens=324, frames_per_group=2)


@pytest.mark.parametrize(
    ("bits", "share", "minimum", "most"),
    [(2, 0.2, 2.2, 3.4), (4, 0.2, 1.8, 2.3), (8, 0.2, 1.2, 1.6), (2, 0.05, 3.0, 4.5)],
)
def test_how_many_more_tokens_the_same_bytes_hold(bits: int, share: float, minimum: float, most: float) -> None:
    """At Qwen2-VL-7B's shapes: metadata, scales, room and the dequantization buffer count, so it is far from 16 / bits."""
    plain, tiered = qwen2_vl_7b("infinipot-v"), qwen2_vl_7b(f"mikv:bits={bits}:full_share={share}")
    assert tiered.total_bytes <= 2 << 30
    ratio = (tiered.memory_tokens + tiered.quantized_tokens) / plain.memory_tokens
    assert minimum <= ratio <= most
