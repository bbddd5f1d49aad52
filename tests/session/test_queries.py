"""Captured queries and sums of attention against the model's own attention; who sees them, and who does not."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from millpond import Session
from millpond.cache.pond import Pond
from millpond.cache.rerotation import shift_uniformly
from millpond.models.base import Family
from millpond.policies.base import Needs
from millpond.policies.methods.h2o import H2O
from millpond.policies.scoring.attention import proxy_attention
from tests.models.tiny import FAMILIES, tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import transient_peak

POLICIES = ["snapkv", "cake", "h2o", "kvmerger", "streammem", "hermes"]
QUESTION = "what is there now"


@contextmanager
def recorded(family: Family) -> Iterator[list[list[torch.Tensor]]]:
    """Each layer's attention probabilities, float64 [H, g, n, L] for every forward: what an eager model gives out itself."""
    seen: list[list[torch.Tensor]] = [[] for _ in family.decoder.layers]  # type: ignore[attr-defined]

    def hook(layer: int) -> Any:
        def record(module: Any, args: Any, output: Any) -> None:
            heads = family.geometry.kv_heads
            seen[layer].append(output[1][0].detach().double().unflatten(0, (heads, -1)))

        return record

    handles = [
        layer.self_attn.register_forward_hook(hook(index))
        for index, layer in enumerate(family.decoder.layers)  # type: ignore[attr-defined]
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tight(family: Family, policy: str, **options: Any) -> Session:
    budget = 130 * family.geometry.bytes_per_token + 120_000
    return Session(family, budget=budget, policy=policy, **options)


def state(session: Session, *, queries: bool = True) -> list[bytes]:
    """Everything that later answers and compactions depend on, bit for bit."""
    pond = session._runner.pond
    tensors = [tensor[:, : pond.length] for layer in pond.layers for tensor in layer.tensors()]
    tensors += [pond.queries.layer(index) for index in range(len(pond.layers)) if queries]
    raw = [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return [*raw, repr((session._runner.clock, pond.length, pond.compactions, pond.recent)).encode()]


def attention(pond: Pond, index: int) -> torch.Tensor:
    """float64 [H, g, w, L]: softmax of the noted queries over all live keys, the queries being those of the last live tokens."""
    queries, keys = pond.queries.layer(index).double(), pond.layers[index].keys[0, :, : pond.length].double()
    scores = torch.einsum("hgwd,hld->hgwl", queries, keys) / keys.shape[2] ** 0.5
    own = torch.arange(pond.length - queries.shape[2], pond.length)
    return scores.masked_fill(torch.arange(pond.length) > own[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_latest_queries_are_the_model_s_own(name: str) -> None:
    family = tiny(name, attn_implementation="eager")
    session = tight(family, "snapkv")
    with recorded(family) as own:
        session.feed(list(moving(40)))
    pond = session._runner.pond
    assert pond.compactions >= 2
    for index, view in enumerate(pond.views(pond.memory_tokens)):
        count = pond.queries.counts[index]
        assert count == min(32, own[index][-1].shape[2])
        model = own[index][-1][:, :, -count:]
        torch.testing.assert_close(attention(pond, index), model, rtol=1e-3, atol=1e-5)
        shown = proxy_attention(view, latest=True)
        memory = model[..., pond.plan.prompt_tokens :].mean((1, 2))
        torch.testing.assert_close(shown.double(), memory, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_proxy_text_s_queries_are_the_model_s_own(name: str) -> None:
    family = tiny(name, attn_implementation="eager")
    session = tight(family, "streammem")
    session.feed(list(moving(40)))
    runner, pond = session._runner, session._runner.pond
    before = state(session, queries=False)
    with recorded(family) as own:
        runner.ask_proxy()
    assert state(session, queries=False) == before
    asked = pond.length

    # The proxy's own tokens share the model's softmax, and not the policy's.
    for index, view in enumerate(pond.views(pond.memory_tokens)):
        assert view.queries is not None
        assert view.queries.shape[2] == len(family.question("", after_video=True))
        attended = own[index][-1][..., pond.plan.prompt_tokens : asked]
        total = own[index][-1][..., :asked].sum(-1, keepdim=True)
        shown = proxy_attention(view, latest=False)
        torch.testing.assert_close(shown.double(), (attended / total).mean((1, 2)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sums_are_the_columns_of_the_model_s_attention(name: str) -> None:
    family = tiny(name, attn_implementation="eager")
    session = Session(family, budget="4MiB", policy="h2o")
    with recorded(family) as own:
        session.feed(list(moving(30)))
        session.ask(QUESTION, max_new_tokens=3)
    pond = session._runner.pond
    assert pond.compactions == 0
    for layer, blocks in zip(pond.layers, own, strict=True):
        expected = torch.zeros(family.geometry.kv_heads, pond.length, dtype=torch.float64)
        for block in blocks:
            if block.shape[3] <= pond.length:  # a question and its answer stand behind the stream
                expected[:, : block.shape[3]] += block.sum((1, 2))
        assert layer.accumulated_attention is not None
        torch.testing.assert_close(
            layer.accumulated_attention[:, : pond.length].double(), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(("alone", "both"), [("keydiff+cake", "h2o+cake"), ("streammem", "h2o beside a text")])
def test_queries_and_sums_of_one_policy_are_those_of_two(alone: str, both: str) -> None:
    @dataclass(frozen=True)
    class Beside(H2O):
        needs: ClassVar[Needs] = Needs(proxy="prompt", accumulated_attention=True)

    family = tiny("qwen2_5_vl")
    sessions = [
        Session(family, budget="4MiB", policy=policy)
        for policy in (alone, "h2o", Beside() if both == "h2o beside a text" else both)
    ]
    for session in sessions:
        session.feed(list(moving(12)))
        session._runner.ask_proxy()
    noted, summed, told = (session._runner.pond for session in sessions)
    for index, layers in enumerate(zip(noted.layers, summed.layers, told.layers, strict=True)):
        assert noted.queries.counts[index] > 0
        assert torch.equal(noted.queries.layer(index), told.queries.layer(index))
        length = layers[1].length
        assert layers[1].accumulated_attention is not None
        assert layers[2].accumulated_attention is not None
        assert float(layers[1].accumulated_attention[:, :length].min()) > 0
        torch.testing.assert_close(
            layers[1].accumulated_attention[:, :length], layers[2].accumulated_attention[:, :length]
        )


@pytest.mark.slow
@pytest.mark.parametrize("policy", nightly(POLICIES, but=["h2o", "kvmerger", "streammem"]))
def test_a_question_leaves_no_trace_and_streams_repeat(policy: str) -> None:
    family = tiny("qwen3_vl")
    first, second = tight(family, policy), tight(family, policy)
    for session in (first, second):
        session.feed(list(moving(41)))
    assert first.usage.compactions >= 2
    asked = state(first)
    first.ask(QUESTION, max_new_tokens=5)
    assert state(first) == asked
    twin = first.fork()
    assert state(twin) == asked
    for session in (first, second, twin):
        session.feed(list(moving(10, start=30)))
        session.resize(session.plan.budget * 9 // 10)  # type: ignore[operator]
        session.feed(list(moving(10, start=50)))
        session.resize(session.plan.budget * 2)  # type: ignore[operator]
        session.feed(list(moving(6, start=70)))
    assert state(first) == state(second) == state(twin)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_remembered_turn_is_never_looked_at(policy: str) -> None:
    session = tight(tiny("qwen2_5_vl"), policy)
    session.feed(list(moving(40)))
    runner, pond = session._runner, session._runner.pond
    runner.ask_proxy()
    queries = [pond.queries.layer(index).clone() for index in range(len(pond.layers))]
    before = [
        None if layer.accumulated_attention is None else layer.accumulated_attention[:, : pond.length].double().sum()
        for layer in pond.layers
    ]
    pond.compact = lambda slots: None  # type: ignore[method-assign]
    session.ask("where is it", max_new_tokens=3, remember=True)
    assert all(torch.equal(pond.queries.layer(index), old) for index, old in enumerate(queries))
    for layer, total in zip(pond.layers, before, strict=True):
        assert layer.accumulated_attention is None or torch.equal(
            layer.accumulated_attention[:, : pond.length].double().sum(), total
        )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_two_threads_on_one_model_do_not_disturb_each_other(policy: str) -> None:
    family = tiny("qwen2_5_vl")
    alone = [tight(family, policy) for _ in range(2)]
    together = [tight(family, policy) for _ in range(2)]
    streams = [list(moving(40, seed=seed)) for seed in range(2)]
    for session, frames in zip(alone, streams, strict=True):
        session.feed(frames)
    threads = [threading.Thread(target=s.feed, args=(f,)) for s, f in zip(together, streams, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state(session) for session in together] == [state(session) for session in alone]


def test_nobody_else_s_forward_is_seen_and_hooks_go_with_the_family() -> None:
    family = tiny("qwen3_vl")
    model, ids = family.model, torch.arange(12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    session = tight(family, "snapkv")
    session.feed(list(moving(40)))
    before = state(session)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert state(session) == before

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    assert hooks() == 2 * len(family.decoder.layers)  # type: ignore[attr-defined]
    del session, family
    gc.collect()
    assert hooks() == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv", "streammem"])
def test_noted_queries_move_with_the_positions(policy: str) -> None:
    """Only differences of positions count, so what the proxy attends to is the same before and after."""
    family = tiny("qwen2_5_vl", max_position_embeddings=200)
    session = tight(family, policy)
    session.feed(list(moving(150, fps=1)))
    assert session.usage.reanchorings >= 1
    runner, pond = session._runner, session._runner.pond

    def attended() -> list[torch.Tensor]:
        return [proxy_attention(view, latest=policy == "snapkv") for view in pond.views(pond.memory_tokens)]

    before = attended()
    shift_uniformly(pond, family.rope, runner.clock, 40)
    for now, was in zip(attended(), before, strict=True):
        torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-5)


def test_noted_queries_follow_the_end_of_the_stream_when_gaps_close() -> None:
    family = tiny("qwen2_5_vl", max_position_embeddings=260)
    session = tight(family, "snapkv", positions="contiguous")
    session.feed(list(moving(60, fps=1)))
    import millpond.cache.rerotation as module

    compared = []
    close = module.close_gaps

    def watched(pond: Pond, rope: Any, clock: Any) -> int:
        layers = range(len(pond.layers))

        def own() -> list[torch.Tensor]:
            """How the queries stand to the keys of their own tokens, which move as one."""
            count = pond.queries.counts[0]
            return [
                torch.einsum(
                    "hgwd,hld->hgwl",
                    pond.queries.layer(i),
                    pond.layers[i].keys[0, :, pond.length - count : pond.length],
                )
                for i in layers
            ]

        before = own()
        moved = close(pond, rope, clock)
        for old, new in zip(before, own(), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
        compared.append(moved)
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "close_gaps", watched)
        session.feed(list(moving(120, fps=1, start=60)))
    assert sum(compared) > 0


def test_summing_up_stays_within_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    add, peaks = Pond.accumulate_attention, []
    session = tight(tiny("qwen2_5_vl"), "h2o")

    def measured(pond: Pond, *args: Any) -> None:
        peaks.append(transient_peak(lambda: add(pond, *args)))
        assert peaks[-1] <= pond.plan.scratch_bytes

    monkeypatch.setattr(Pond, "accumulate_attention", measured)
    session.feed(list(moving(20)))
    assert max(peaks) > 0


def test_what_it_costs_is_in_the_plan() -> None:
    family = tiny("qwen2_5_vl")
    geometry = family.geometry
    plain = Session(family, budget="1MiB", policy="recent").plan
    summed = Session(family, budget="1MiB", policy="h2o").plan
    assert summed.bytes_per_token == plain.bytes_per_token + 4 * geometry.kv_heads * geometry.layers
    latest = Session(family, budget="1MiB", policy="snapkv").plan
    assert latest.query_bytes == 32 * 4 * 16 * 4 * geometry.layers  # tokens, query heads, width, bytes
    session = Session(family, budget="1MiB", policy="streammem", reserve_tokens=3)
    proxy = len(family.question("", after_video=True))
    assert session.plan.query_bytes == proxy * geometry.query_bytes
    assert session.plan.reserve_tokens == proxy, "the proxy runs in the reserve"
    session.feed(list(moving(120)))
    assert session.usage.compactions >= 1
    assert session._runner.pond.ledger.account("queries") == session._runner.pond.queries.rows.nbytes


@pytest.mark.parametrize("policy", POLICIES)
def test_the_least_budget_works(policy: str) -> None:
    from millpond import BudgetError

    family = tiny("qwen2_5_vl")
    minimum = 1
    for _ in range(2):  # first for text alone, then for the frames
        with pytest.raises(BudgetError) as caught:
            Session(family, budget=minimum, policy=policy).plan_for(56, 56)
        minimum = caught.value.minimum or 0
    session = Session(family, budget=minimum, policy=policy)
    session.feed(list(moving(40)))
    assert session.usage.compactions >= 2
    assert session.ask("now", max_new_tokens=2).token_ids
    assert session.usage.peak_bytes <= minimum
