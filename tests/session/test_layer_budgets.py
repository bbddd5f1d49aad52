"""Layers that keep different numbers of tokens: the same hidden states as a full cache in which the dropped are masked."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from millpond import BudgetError, PolicyError, Session, policies
from millpond.cache.pond import Pond
from millpond.cache.storage import ArenaStorage
from millpond.models.base import Family, Tokens
from millpond.models.transformers_insides import cache_argument
from millpond.policies.allocators.base import Allocator
from millpond.policies.base import Shape, View
from millpond.policies.layered import Layered
from tests.models.tiny import FAMILIES, tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes, transient_peak
from tests.session.test_cap import Watched
from tests.session.test_session import state, tight

QUESTION = "what is there now"


@dataclass(frozen=True)
class Fixed(Allocator):
    """The same weights every time."""

    name = "fixed"
    source = "this test"
    shares: tuple[float, ...] = (1.0, 1.0, 1.0)

    def weights(self, views: Iterator[View]) -> list[float]:
        return [self.shares[view.layer] for view in views]

    def scratch(self, shape: Shape) -> int:
        return 0


def layered(policy: str, *shares: float) -> Layered:
    return Layered(policies.get(policy), Fixed(shares))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", ["infinipot-v", "recent"])
def test_equal_budgets_change_no_bit(name: str, policy: str) -> None:
    family = tiny(name)
    frames = list(moving(61))
    plain, budgeted = (Session(family, budget="4GiB", policy=p) for p in (policy, layered(policy, 1, 1, 1)))
    # The same slots for both: budgets of equal bytes would differ by the scratch of a layer that may hold twice the mean.
    plan = tight(family, policy=policy).plan_for(56, 56)
    for session in (plain, budgeted):
        session._runner.grid = family.grid(56, 56)
        session._runner.plan_for = lambda grid: plan  # type: ignore[method-assign]
        session.feed(frames)
        session.ask(QUESTION, max_new_tokens=4, remember=True)
        session.feed(list(moving(30, start=40)))
    assert state(plain) == state(budgeted)
    answers = [session.ask(QUESTION, max_new_tokens=8).token_ids for session in (plain, budgeted)]
    assert answers[0] == answers[1]
    assert budgeted.usage.compactions > 2
    assert isinstance(budgeted._runner.pond.storage, ArenaStorage)
    assert not budgeted._runner.pond.uneven


@dataclass(frozen=True)
class Noted(Layered):
    """Remembers by name what each head of each layer kept."""

    kept: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, view: View, slots: int) -> Tensor:
        chosen = super().keep(view, slots)
        self.kept[view.layer] = chosen
        return chosen


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_cache_is_a_full_one_with_the_dropped_tokens_masked(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference keeps every token and gets, in each layer and head, a mask with holes where a token was dropped."""
    family = tiny(name, attn_implementation=implementation)
    policy = Noted(policies.get("random"), Fixed((0.6, 1.0, 1.5)))
    session, whole = Session(family, budget="16MiB", policy=policy), Session(family, budget="16MiB")
    for one in (session, whole):
        one.feed(list(moving(40)))
    pond, start = session._runner.pond, session.plan.prompt_tokens
    count = pond.memory_tokens
    pond.compact(count // 2)
    lengths = [layer.length for layer in pond.layers]
    assert pond.uneven
    assert sum(lengths) == 3 * (start + count // 2)
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3
    holes = torch.zeros(3, family.geometry.kv_heads, start + count, dtype=torch.bool)
    for layer, chosen in policy.kept.items():
        holes[layer, :, start:] = True
        holes[layer].scatter_(1, chosen + start, False)
    assert whole._runner.pond.length == start + count

    # A block of frames, then single tokens, then a question: each through both.
    forward = family.forward
    seen: list[Tensor] = []

    def recorded(tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
        cache.filling = False  # what ingest would leave out is looked at
        seen.append(forward(tokens, positions, cache))
        return seen[-1]

    monkeypatch.setattr(family, "forward", recorded)

    def masked(attention: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        cache = kwargs[cache_argument(type(attention))]
        if cache is not whole._runner.pond:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        past, new = cache.layers[attention.layer_idx].length, hidden.shape[1]
        see = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        gone = torch.nn.functional.pad(holes[attention.layer_idx], (0, past + new - holes.shape[2]))
        heads = attention.num_heads if hasattr(attention, "num_heads") else attention.config.num_attention_heads
        see = (see & ~gone[:, None]).repeat_interleave(heads // len(gone), 0)[None]
        if implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": see}

    hooks = [
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
        for layer in family.decoder.layers  # type: ignore[attr-defined]
    ]
    for one in (session, whole):
        one.feed(list(moving(9, start=20, seed=2)))
        one.ask(QUESTION, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    middle = len(seen) // 2
    assert len(seen) == 2 * middle >= 6
    for ours, theirs in zip(seen[:middle], seen[middle:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(
        layer.length - before == pond.layers[0].length - lengths[0]
        for layer, before in zip(pond.layers, lengths, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    nightly(
        [
            ("qwen2_5_vl", "infinite-vggt"),
            ("qwen2_5_vl", "cake+cake"),
            ("qwen3_vl", "cake+cake"),
            ("llava_onevision", "recent+fixed"),
        ],
        but=[("qwen3_vl", "cake+cake")],
    ),
)
def test_no_phase_passes_the_budget(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny(name)
    chosen = layered("recent", 0.2, 3.0, 0.7) if policy == "recent+fixed" else policies.read(policy)
    budget = 170 * family.geometry.bytes_per_token + 160_000
    session = Session(family, budget=budget, policy=chosen)
    watched = Watched(session, monkeypatch)
    session.feed(list(moving(71)))
    pond = session._runner.pond
    assert isinstance(pond.storage, ArenaStorage)
    storage = pond.storage.arena.flat("keys").data_ptr()
    assert session.usage.compactions >= 2
    assert pond.uneven
    assert sum(layer.length for layer in pond.layers) <= 3 * session.plan.slots
    watched.look()
    session.ask(QUESTION, max_new_tokens=4)
    session.ask(QUESTION, max_new_tokens=10_000)
    session.ask(QUESTION, max_new_tokens=10_000, remember=True)
    session.feed(list(moving(11, start=36)))
    assert pond.storage.arena.flat("keys").data_ptr() == storage  # cut in place, never replaced
    for size in (budget * 3, budget * 10 // 9, budget, budget * 19 // 20):
        session.resize(size)
        session.feed(list(moving(40, start=session.usage.stream_seconds + 1)))
        assert held_bytes(session) <= session.usage.allocated_bytes <= size
        assert pond.storage.nbytes == 3 * pond.plan.slots * family.geometry.bytes_per_token // 3
    session.ask(QUESTION, max_new_tokens=3)
    kept = session.memory()
    assert len({layer.seconds.shape[1] for layer in kept}) > 1


def test_resizing_moves_the_right_bytes() -> None:
    """What survives a resize is bit for bit what was there, up to half of the new slots when it shrinks a little."""
    family = tiny("qwen2_5_vl")
    session = Session(family, budget="600KiB", policy=layered("recent", 0.5, 1.0, 1.5))
    session.feed(list(moving(80)))
    pond = session._runner.pond
    for size, grows in (("2MiB", True), ("1900KiB", False), ("500KiB", False), ("520KiB", True)):
        before = [[tensor[:, : layer.length].clone() for tensor in layer.tensors()] for layer in pond.layers]
        slots = pond.plan.slots
        session.resize(size)
        start = pond.plan.prompt_tokens
        for layer, olds in zip(pond.layers, before, strict=True):
            for tensor, old in zip(layer.tensors(), olds, strict=True):
                assert torch.equal(tensor[:, :start], old[:, :start])
                # `recent` keeps the latest and four at the start.
                kept = layer.length - start - 4
                assert torch.equal(tensor[:, layer.length - kept : layer.length], old[:, old.shape[1] - kept :])
        assert (pond.plan.slots >= slots) == grows
        assert len({layer.capacity - layer.length for layer in pond.layers}) == 1
        session.feed(list(moving(30, start=session.usage.stream_seconds + 1)))


@pytest.mark.parametrize("remember", [False, True])
def test_turns_forks_and_faults_leave_every_layer_as_it_was(remember: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen2_5_vl")
    session = tight(family, policy=layered("infinipot-v", 0.4, 1.0, 1.6))
    session.feed(list(moving(41)))
    pond = session._runner.pond
    assert pond.uneven
    lengths = [layer.length for layer in pond.layers]
    before = whole(session)
    session.ask(QUESTION, max_new_tokens=5)
    assert whole(session) == before
    with monkeypatch.context() as patch:
        original, calls = Pond.update, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:  # the first layer has taken the block already
                raise RuntimeError("no")
            return original(*args, **kwargs)

        patch.setattr(Pond, "update", failing)
        with pytest.raises(RuntimeError):
            session.ask(QUESTION)
    assert whole(session) == before
    assert [layer.length for layer in pond.layers] == lengths
    fork = session.fork()
    assert whole(fork) == before
    fork.ask(QUESTION, max_new_tokens=3, remember=remember)
    fork.feed(list(moving(30, start=21)))
    assert whole(session) == before
    session.ask(QUESTION, max_new_tokens=3, remember=remember)
    session.feed(list(moving(30, start=21)))
    assert whole(session) == whole(fork)


def whole(session: Session) -> list[bytes]:
    """Every layer's live rows, bit for bit."""
    return [
        tensor[:, : layer.length].contiguous().view(torch.uint8).numpy().tobytes()
        for layer in session._runner.pond.layers
        for tensor in layer.tensors()
    ]


def test_positions_are_moved_in_layers_of_any_length() -> None:
    family = tiny("qwen2_5_vl", max_position_embeddings=120)
    for positions in ("contiguous", "absolute"):
        session = Session(family, budget="400KiB", policy=layered("recent", 0.5, 1.0, 1.5), positions=positions)  # type: ignore[arg-type]
        session.feed(list(moving(200, fps=1)))
        assert session.usage.reanchorings >= 2
        for layer in session._runner.pond.layers:
            assert int(layer.positions[:, : layer.length].max()) < 120


def test_two_sessions_on_one_model_do_not_see_each_others_masks(qwen: Family) -> None:
    plain, uneven = tight(qwen), tight(qwen, policy=layered("recent", 0.3, 1.0, 1.7))
    alone = tight(qwen)
    for frame in moving(41):
        plain.feed(frame)
        uneven.feed(frame)
        alone.feed(frame)
    assert uneven._runner.pond.uneven
    assert state(plain) == state(alone)


def test_a_compaction_allocates_its_declared_scratch(qwen: Family) -> None:
    session = tight(qwen, policy=layered("infinipot-v", 0.1, 1.0, 1.9))
    session.feed(list(moving(40)))
    pond = session._runner.pond
    peak = transient_peak(lambda: pond.compact(pond.memory_tokens * 2 // 3))
    assert 0 < peak <= pond.plan.scratch_bytes


def test_a_layer_keeps_what_is_protected_and_at_most_twice_the_mean(qwen: Family) -> None:
    session = tight(qwen, policy=layered("infinipot-v", 1e-9, 1.0, 1e9))
    session.feed(list(moving(60)))
    pond, start = session._runner.pond, session.plan.prompt_tokens
    pond.compact(pond.memory_tokens - 20)
    held = [layer.length - start for layer in pond.layers]
    recent = int(next(pond.views(pond.memory_tokens)).protected[0].sum())
    assert held[0] >= recent > 0
    assert max(held) <= 2 * sum(held) / 3 + 1


def test_where_layer_budgets_cannot_work_there_is_one_line(qwen: Family) -> None:
    with pytest.raises(BudgetError):
        Session(qwen, budget="20KiB", policy="keydiff+diversity")
    short = Layered(policies.get("recent"), replace(Fixed(), shares=(1.0, 1.0, 1.0)))
    object.__setattr__(short.allocator, "weights", lambda views: [1.0])
    session = tight(qwen, policy=short)
    with pytest.raises(PolicyError, match="1 layer budgets for 3 layers"):
        session.feed(list(moving(60)))


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")
