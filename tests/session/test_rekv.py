"""ReKV: what leaves the window is in host memory, questions recall the right frames of it, and both caps hold at every step."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from millpond import BudgetError, PolicyError, PondCache, Session, policies
from millpond.cache import retrieval
from millpond.cache.pond import Pond
from millpond.models.base import Family, Tokens
from millpond.policies.base import Needs, View
from millpond.policies.methods.rekv import ReKV
from millpond.stream.runner import Runner
from tests.models.tiny import FAMILIES, tiny
from tests.session.frames import moving
from tests.session.measure import held_bytes, transient_peak
from tests.session.test_session import state

QUESTION = "what is there now"


def small(family: Family, **options: object) -> Session:
    """A session whose window holds a few frames."""
    budget = 170 * family.geometry.bytes_per_token + 120_000
    return Session(family, budget=budget, **{"policy": "rekv", "host_budget": "8MiB", **options})  # type: ignore[arg-type]


def roomy(family: Family, monkeypatch: pytest.MonkeyPatch, **options: object) -> Session:
    """A session that compacts to two frames although it has room to recall everything."""
    ensure_capacity = Pond.ensure_capacity

    def admit_little(pond: Pond, tokens: int) -> None:
        if tokens and pond.memory_tokens > 3 * pond.plan.group_tokens:
            pond.compact(2 * pond.plan.group_tokens + 5)  # a frame leaves in two parts
        ensure_capacity(pond, tokens)

    monkeypatch.setattr(Pond, "ensure_capacity", admit_little)
    budget = 8000 * family.geometry.bytes_per_token
    return Session(family, budget=budget, **{"policy": "rekv:frames=100", "host_budget": "16MiB", **options})  # type: ignore[arg-type]


class Recorder:
    """Keeps what every forward wrote to the cache, as it was written."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.hidden: list[torch.Tensor] = []
        self.on = True
        forward = Runner._forward

        def recorded(runner: Runner, tokens: Tokens, positions: torch.Tensor, **options: object) -> torch.Tensor:
            mark = runner.pond.length
            hidden = forward(runner, tokens, positions, **options)  # type: ignore[arg-type]
            if runner is session._runner:
                rows = [
                    (x.keys[:, :, mark : x.length].clone(), x.values[:, :, mark : x.length].clone())
                    for x in runner.pond.layers
                ]
                if self.on:
                    self.parts.append(rows)
                self.hidden.append(hidden)
            return hidden

        monkeypatch.setattr(Runner, "_forward", recorded)

    def cache(self) -> DynamicCache:
        cache = DynamicCache()
        for index in range(len(self.parts[0])):
            keys, values = (torch.cat([part[index][which] for part in self.parts], dim=2) for which in (0, 1))
            cache.update(keys, values, index)
        return cache


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
@pytest.mark.parametrize("name", FAMILIES)
def test_when_every_frame_is_recalled_the_answer_is_that_of_a_full_cache(
    name: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys and values as they were when the frames were watched, at their true positions."""
    family = tiny(name)
    session = roomy(family, monkeypatch, positions=positions)
    record = Recorder(session, monkeypatch)
    session.feed(list(moving(40)))
    host = session._runner.pond.host
    assert host is not None
    assert host.ring.forgotten == 0
    assert host.frames >= 8
    assert host.tokens + session.usage.memory_tokens + session.plan.prompt_tokens == session.usage.stream_tokens
    record.on, record.hidden = False, []
    clock = session._runner.clock
    question = family.question(QUESTION, after_video=True)
    with torch.no_grad():
        at = family.assign_positions(question, type(clock)(**vars(clock)))
        expected = family.forward(question, at, record.cache())
    answer = session.ask(QUESTION, max_new_tokens=6)
    assert torch.allclose(family.logits(record.hidden[0]), family.logits(expected), atol=1e-4)
    assert len(answer.token_ids) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frames_recalled_are_those_of_a_brute_force_in_double_precision(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name)
    session = small(family, positions="absolute")
    session.feed(list(moving(60)))
    pond, seen = session._runner.pond, {}
    host, geometry = pond.host, family.geometry
    assert host is not None
    fill = retrieval.Retrieval.fill

    def watched(self: retrieval.Retrieval, index: int, queries: torch.Tensor) -> None:
        fill(self, index, queries)
        part = slice(self.start, self.start + self.count)
        layer = pond.layers[index]
        seen[index] = (queries.clone(), layer.keys[0, :, part].clone(), layer.values[0, :, part].clone())
        assert bool((layer.positions[:, part] == layer.positions[:1, part]).all())

    monkeypatch.setattr(retrieval.Retrieval, "fill", watched)
    session.ask(QUESTION, max_new_tokens=1)
    assert len(seen) == geometry.layers
    different = set()
    for index, (queries, keys, values) in seen.items():
        grouped = queries.double().mean(0).view(geometry.kv_heads, geometry.kv_groups, -1).mean(1)
        scores, frames = {}, {}
        for number in range(host.ring.first, host.ring.end):
            whole = [torch.cat(part, dim=-2) for part in zip(*host.pieces(index, number, host.size(number), 999))]  # noqa: B905
            frames[number] = whole
            mean = whole[0].double().mean(1)
            scores[number] = float((grouped * mean).sum())
        wanted: list[tuple[int, int]] = []
        left = session.plan.retrieved_tokens
        for number in sorted(scores, key=lambda one: -scores[one]):
            count = min(left, host.size(number))
            wanted += [(number, count)] if count else []
            left -= count
        chosen = sorted(wanted)
        different.add(tuple(chosen))
        expected = torch.cat([frames[number][1][:, :count] for number, count in chosen], dim=1)
        assert torch.equal(values, expected)
        turned = torch.cat([frames[number][0][:, :count] for number, count in chosen], dim=1).clone()
        family.rope.rotate_(turned, torch.cat([frames[number][2][:count] for number, count in chosen]))
        assert torch.allclose(keys, turned, atol=1e-6)
    assert len(different) > 1, "layers choose for themselves"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frames", [3, 61])
def test_asking_leaves_no_trace_and_gives_the_same_answer_twice(name: str, frames: int) -> None:
    session = small(tiny(name))
    session.feed(list(moving(frames)))
    host = session._runner.pond.host
    assert host is not None
    before, held = state(session), (host.frames, host.tokens, host.ring.next)
    first = session.ask(QUESTION, max_new_tokens=6)
    assert session.ask(QUESTION, max_new_tokens=6).token_ids == first.token_ids
    assert state(session) == before
    assert (host.frames, host.tokens, host.ring.next) == held
    assert (session.usage.host_bytes_out > 0) == (frames > 50)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "admission"),
    [("qwen2_5_vl", torch.bfloat16, "curvestream"), ("qwen3_vl", torch.float32, None)],
)
def test_neither_cap_is_passed_at_any_step(
    name: str, dtype: torch.dtype, admission: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, dtype=dtype)
    host_budget = 120_000
    session = small(family, host_budget=host_budget, admission=admission)
    limit, looks = session.plan.budget, 0
    assert limit is not None

    def look(transient: int = 0) -> None:
        nonlocal looks
        looks += 1
        host = session._runner.pond.host
        assert host is not None
        assert held_bytes(session, but=host) + transient <= limit
        assert host.nbytes <= host_budget
        assert held_bytes(session) - held_bytes(session, but=host) <= host_budget + 100  # the tier's own few numbers

    compact, fill, forward = Pond.compact, retrieval.Retrieval.fill, family.forward

    def measured(pond: Pond, run: object) -> None:
        allocated = pond.host is None or pond.host.nbytes
        peak = transient_peak(run)  # type: ignore[arg-type]
        if allocated:  # else the host's own storage is among what was allocated
            assert peak <= pond.plan.scratch_bytes
            look(peak)

    monkeypatch.setattr(Pond, "compact", lambda pond, slots: measured(pond, lambda: compact(pond, slots)))
    monkeypatch.setattr(
        retrieval.Retrieval,
        "fill",
        lambda self, index, queries: measured(self._pond, lambda: fill(self, index, queries)),
    )

    def looked(*args: object) -> torch.Tensor:
        look()
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(family, "forward", looked)
    session.feed(list(moving(51)))
    session.ask(QUESTION, max_new_tokens=4)
    session.ask(QUESTION, max_new_tokens=10_000)
    session.ask(QUESTION, max_new_tokens=10_000, remember=True)
    session.feed(list(moving(20, start=26)))
    limit = session.plan.budget * 2
    session.resize(limit)
    session.feed(list(moving(24, start=40)))
    session.ask(QUESTION, max_new_tokens=4)
    session.resize(session.plan.budget // 2)
    limit = session.plan.budget
    look()
    session.ask(QUESTION, max_new_tokens=4)
    usage = session.usage
    assert looks > 50
    assert usage.host_frames_forgotten > 0
    assert 0 < usage.host_bytes <= host_budget == usage.host_budget_bytes
    assert usage.host_bytes_in > 0 < usage.host_bytes_out
    assert 0 < usage.seconds_host < usage.seconds_total


def test_the_plan_gives_at_most_half_to_what_is_recalled_and_at_least_one_frame() -> None:
    family = tiny("qwen2_5_vl")
    with pytest.raises(BudgetError) as caught:
        Session(family, budget=100_000, policy="rekv", host_budget="1MiB").plan_for(56, 56)
    minimum = caught.value.minimum
    assert minimum is not None
    session = Session(family, budget=minimum, policy="rekv", host_budget="1MiB")
    assert session.plan_for(56, 56).retrieved_frames == 1
    session.feed(list(moving(40)))
    session.ask("now", max_new_tokens=2)
    assert session.usage.peak_bytes <= minimum
    for size, frames in ((1 << 19, 64), (1 << 21, 64), (1 << 21, 7)):
        plan = Session(family, budget=size, policy=f"rekv:frames={frames}", host_budget="1MiB").plan_for(56, 56)
        behind = plan.slots - plan.prompt_tokens
        assert plan.prompt_tokens + plan.memory_tokens + plan.headroom_tokens + plan.reserve_tokens == plan.slots
        assert plan.retrieved_tokens == plan.retrieved_frames * plan.group_tokens <= behind // 2
        assert 1 < plan.retrieved_frames <= frames
        assert plan.total_bytes <= size


def test_the_oldest_frames_leave_a_full_host() -> None:
    family = tiny("llava_onevision")
    session = small(family, host_budget=200_000)
    host, seen = None, []
    for frame in moving(90):
        session.feed(frame)
        host = session._runner.pond.host
        assert host is not None
        times = [host.time_us(number) for number in range(host.ring.first, host.ring.end)]
        assert times == sorted(set(times))
        seen = sorted({*seen, *times})
        assert times == seen[len(seen) - len(times) :], "what is missing is the oldest"
    assert host is not None
    assert host.ring.forgotten == len(seen) - host.frames > 20
    window = {round(time * 1e6) for time in session.memory()[0].seconds[0]}
    assert {*seen, *window} == {round(index * 5e5) for index in range(90)}, (
        "a frame is in the window, in the host or was"
    )
    assert len({host.time_us(host.ring.end - 1), *window}) <= len(window) + 1


def test_a_tier_in_a_file_gives_the_same_answers_and_leaves_nothing(tmp_path: Path) -> None:
    family = tiny("qwen2_5_vl")
    plain, filed = small(family), small(family, host_path=tmp_path)
    for session in (plain, filed):
        session.feed(list(moving(60)))
    assert plain.usage.host_frames == filed.usage.host_frames > 20
    assert plain.ask(QUESTION, max_new_tokens=8).token_ids == filed.ask(QUESTION, max_new_tokens=8).token_ids
    assert filed.fork().ask(QUESTION, max_new_tokens=8).token_ids == plain.ask(QUESTION, max_new_tokens=8).token_ids
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BudgetError, match="no file of"):
        small(family, host_path=tmp_path / "nowhere").feed(list(moving(60)))


def test_a_fork_shares_nothing() -> None:
    session = small(tiny("qwen2_5_vl"), host_budget=300_000)
    session.feed(list(moving(80)))
    before, expected = state(session), session.ask(QUESTION, max_new_tokens=6).token_ids
    other = session.fork()
    assert other.ask(QUESTION, max_new_tokens=6).token_ids == expected
    other.feed(list(moving(60, start=40, seed=5)))
    assert state(session) == before
    assert session.ask(QUESTION, max_new_tokens=6).token_ids == expected
    mine, theirs = session._runner.pond.host, other._runner.pond.host
    assert mine is not None
    assert theirs is not None
    assert mine.ring.end < theirs.ring.end
    assert mine._keys.untyped_storage().data_ptr() != theirs._keys.untyped_storage().data_ptr()


def test_a_remembered_turn_drops_what_it_recalled() -> None:
    session = small(tiny("qwen2_5_vl"), reserve_tokens=64)
    session.feed(list(moving(61)))
    tokens = session.usage.stream_tokens
    memory = {round(time * 1e6) for time in session.memory()[0].seconds[0]}
    answer = session.ask(QUESTION, max_new_tokens=5, remember=True)
    question = len(session.family.question(QUESTION, after_video=True))
    group = session.plan.group_tokens
    assert session.usage.stream_tokens == tokens + question + len(answer.token_ids) + group, "the odd frame is one too"
    layer = session._runner.pond.layers[0]
    times = layer.time_us[0, session.plan.prompt_tokens : layer.length]
    assert bool((times[1:] >= times[:-1]).all()), "recalled frames would break the order"
    assert {*times.tolist()} <= memory | {round(30.0 * 1e6)}
    session.feed(list(moving(40, start=31)))
    assert session.ask(QUESTION, max_new_tokens=5).token_ids == session.ask(QUESTION, max_new_tokens=5).token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "positions"), [*((name, "contiguous") for name in FAMILIES), ("qwen2_5_vl", "absolute")]
)
def test_past_the_trained_range_recalled_frames_stand_in_front_of_the_window(
    name: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, max_position_embeddings={"qwen2_vl": 100, "qwen2_5_vl": 200}.get(name, 400))
    session = small(family, positions=positions)
    session.feed(list(moving(131 if name.startswith("qwen") else 66, fps=1)))
    assert session.usage.reanchorings > 0
    pond, front, clock = session._runner.pond, [], session._runner.clock
    fill = retrieval.Retrieval.fill

    def watched(self: retrieval.Retrieval, index: int, queries: torch.Tensor) -> None:
        fill(self, index, queries)
        part = slice(self.start, self.start + self.count)
        layer = pond.layers[index]
        time, along = layer.time_us[0, part], layer.positions[0, part, 0]
        assert bool((time[1:] >= time[:-1]).all())
        assert bool((along[1:] >= along[:-1]).all()), "in stream order"
        front.append((self._front, int(along[-1]), int(along[0]), layer.positions[0, part]))

    monkeypatch.setattr(retrieval.Retrieval, "fill", watched)
    before = state(session)
    session.ask(QUESTION, max_new_tokens=2)
    assert state(session) == before
    assert len(front) == family.geometry.layers
    prompt_end = session.plan.prompt_tokens
    for window, last, first, known in front:
        assert last <= window
        if positions == "contiguous":
            assert window - last <= clock.step
            assert first >= prompt_end, "room was left in front of the window"
            assert int(known.min()) >= 0
            assert int(known.max()) < clock.next


def test_refusals() -> None:
    family = tiny("qwen2_5_vl")
    cases = [
        ({"policy": "rekv"}, PolicyError, "give it a host_budget"),
        ({"policy": "recent", "host_budget": "1MiB"}, PolicyError, "leave out host_budget"),
        ({"policy": "recent", "host_path": "."}, PolicyError, "leave out host_budget"),
        (
            {"policy": "rekv+diversity", "host_budget": "1MiB"},
            PolicyError,
            "retrieval and layer budgets do not go together",
        ),
        ({"policy": "rekv:frames=0", "host_budget": "1MiB"}, PolicyError, "whole number"),
        ({"policy": "rekv", "host_budget": "none"}, BudgetError, "cannot read"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            Session(family, budget="1MiB", **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match="only a Session retrieves"):
        PondCache(family.model, "1MiB", "rekv")
    session = Session(family, budget="1MiB", policy="rekv", host_budget=5000)
    with pytest.raises(BudgetError, match="cannot hold one frame") as caught:
        session.feed(list(moving(2)))
    assert caught.value.minimum is not None
    Session(family, budget="1MiB", policy="rekv", host_budget=caught.value.minimum).feed(list(moving(40)))
    with pytest.raises(BudgetError):
        Session(family, budget="1MiB", policy="rekv", host_budget=caught.value.minimum - 1).feed(list(moving(2)))


class Uneven(ReKV):
    def keep(self, view: View, slots: int) -> torch.Tensor:
        keep = super().keep(view, slots)
        if view.layer == 1:
            keep[1, 0] = 0
        return keep


def test_a_policy_that_recalls_must_keep_the_same_everywhere() -> None:
    session = small(tiny("qwen2_5_vl"), policy=Uneven())
    with pytest.raises(PolicyError, match="same tokens in every head and layer"):
        session.feed(list(moving(40)))
    layers = session._runner.pond.layers
    assert all(torch.equal(layer.time_us[:, :50], layers[0].time_us[:, :50]) for layer in layers), "finished alike"
    assert policies.get("rekv").needs.retrieved_frames == 64


@dataclass(frozen=True)
class FromBelow(ReKV):
    """The same, asked from the deepest layer up."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, deeper_scores=True)


def test_the_order_in_which_layers_are_asked_changes_no_bit_of_host_memory() -> None:
    family = tiny("qwen2_5_vl")
    down, up = small(family), small(family, policy=FromBelow())
    # The same slots for both: what goes from layer to layer takes scratch.
    plan = up.plan_for(56, 56)
    for session in (down, up):
        session._runner.plan_for = lambda grid: plan  # type: ignore[method-assign]
        session.feed(list(moving(60)))
    hosts = [session._runner.pond.host for session in (down, up)]
    assert hosts[0] is not None
    assert hosts[1] is not None
    assert hosts[0].frames > 5
    for name in ("_table", "_positions", "_keys", "_values", "_key_sums", "_grid_positions"):
        assert torch.equal(getattr(hosts[0], name), getattr(hosts[1], name))
    assert state(down) == state(up)
