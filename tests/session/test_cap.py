"""The cap, at every instant, in every phase: by the ledger and by independent measurement."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from millpond import BudgetError, Session
from millpond.cache.plan import Plan
from millpond.cache.pond import Pond
from millpond.frames import Frame
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes, transient_peak

QUESTION = "what is there now"


class Watched:
    """Wraps a session so that every forward, compaction and resize is measured while it runs."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session = session
        self.scratch: list[int] = []
        self.worst = 0
        self.limit = session.plan.budget
        forward, compact, resize = session.family.forward, Pond.compact, Pond.resize

        def watched_forward(*args: object) -> torch.Tensor:
            self.look()
            hidden = forward(*args)
            self.look()
            return hidden

        def watched_compact(pond: Pond, slots: int) -> None:
            held = held_bytes(session)
            peak = transient_peak(lambda: compact(pond, slots))
            self.scratch.append(peak)
            self.note(held + peak)
            assert peak <= pond.plan.scratch_bytes

        def watched_resize(pond: Pond, plan: Plan) -> None:
            """At every allocation: what the session holds, old tensors that are still alive, and the new one."""
            self.limit = max(pond.plan.budget, plan.budget)
            before = [weakref.ref(tensor) for layer in pond.layers for tensor in (layer.keys, layer.values)]
            allocate = torch.zeros

            def watched_zeros(*args: object, **kwargs: object) -> torch.Tensor:
                new: torch.Tensor = allocate(*args, **kwargs)
                self.note(held_bytes(session, new, *(ref() for ref in before)))
                return new

            with monkeypatch.context() as patched:
                patched.setattr(torch, "zeros", watched_zeros)
                resize(pond, plan)
            self.limit = plan.budget
            self.look()

        monkeypatch.setattr(session.family, "forward", watched_forward)
        monkeypatch.setattr(Pond, "compact", watched_compact)
        monkeypatch.setattr(Pond, "resize", watched_resize)

    def note(self, size: int) -> None:
        self.worst = max(self.worst, size)
        assert size <= self.limit

    def look(self) -> None:
        self.note(held_bytes(self.session))
        assert self.session._runner.pond.ledger.held <= self.limit
        assert held_bytes(self.session) <= self.session._runner.pond.ledger.held


POLICIES = ["infinipot-v", "recent", "uniform", "random", "snapkv", "h2o", "cake", "kvmerger", "streammem", "hermes"]
# Every policy on one family (tests/policies/test_matrix.py measures their scratch in every dtype); on the others one policy of each way
# in which queries reach it.
CASES = [
    *(("qwen2_5_vl", policy, torch.bfloat16) for policy in POLICIES),
    *(("qwen2_5_vl", policy, torch.float32) for policy in ("infinipot-v", "cake", "kvmerger", "hermes")),
    *(("qwen3_vl", policy, torch.bfloat16) for policy in ("infinipot-v", "snapkv", "h2o", "streammem")),
    *(("llava_onevision", policy, torch.float32) for policy in ("infinipot-v", "snapkv", "h2o", "streammem")),
]
BY_DAY = [CASES[0], ("qwen3_vl", "streammem", torch.bfloat16), ("llava_onevision", "h2o", torch.float32)]


@pytest.mark.parametrize(("name", "policy", "dtype"), nightly(CASES, but=BY_DAY))
def test_no_phase_ever_passes_the_budget(
    name: str, policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, dtype=dtype)
    budget = 150 * family.geometry.bytes_per_token + 120_000
    session = Session(family, budget=budget, policy=policy)
    watched = Watched(session, monkeypatch)
    session.feed(list(moving(71)))  # ingest and compaction, an odd frame left over
    assert session.usage.compactions >= 2
    watched.look()
    session.ask(QUESTION, max_new_tokens=4)  # question
    session.ask(QUESTION, max_new_tokens=10_000)  # an answer longer than the reserve
    session.ask(QUESTION, max_new_tokens=10_000, remember=True)
    session.feed(list(moving(11, start=36)))
    session.resize(budget * 3)
    session.feed(list(moving(60, start=50)))
    session.resize(budget)
    session.feed(list(moving(8, start=90)))
    session.ask(QUESTION, max_new_tokens=3)
    usage = session.usage
    assert len(watched.scratch) > 3
    assert usage.peak_bytes <= budget * 3
    assert usage.allocated_bytes <= budget
    assert held_bytes(session) <= usage.allocated_bytes


def test_frames_that_wait_stay_within_a_budget_that_is_made_smaller() -> None:
    """Smaller blocks wait for fewer frames: those that wait already are taken in first."""
    family = tiny("qwen2_vl")
    session, waited = Session(family, budget="2MiB"), []

    def source() -> Iterator[Frame]:
        for index, frame in enumerate(moving(40)):
            if index == 7:
                waited.append(session._runner.pond.ledger.account("waiting frames"))
                session.resize("300KiB")
                assert waited[0] > session.plan.waiting_bytes
            assert session._runner.pond.ledger.account("waiting frames") <= session.plan.waiting_bytes
            assert held_bytes(session) <= session._runner.pond.ledger.held <= session.plan.budget
            yield frame

    assert session.feed(source()) == 40
    assert session.usage.frames_dropped == 0


def test_a_long_answer_stops_at_the_reserve_and_says_so() -> None:
    session = Session(tiny("qwen2_5_vl"), budget="300KiB")
    session.feed(list(moving(40)))
    answer = session.ask(QUESTION, max_new_tokens=100_000)
    assert answer.finish_reason in ("length", "stop")
    assert len(answer.token_ids) <= session.plan.reserve_tokens + session.plan.headroom_tokens
    with pytest.raises(BudgetError, match="would do"):
        session.ask("word " * 5000)


def test_the_least_budget_works_for_a_long_stream_and_one_byte_less_does_not() -> None:
    family = tiny("qwen2_5_vl")
    with pytest.raises(BudgetError) as caught:
        Session(family, budget=100_000).plan_for(56, 56)
    minimum = caught.value.minimum
    assert minimum is not None
    session = Session(family, budget=minimum)
    session.feed(list(moving(50)))
    session.ask("now", max_new_tokens=2)
    assert held_bytes(session) <= session.usage.peak_bytes <= minimum
    with pytest.raises(BudgetError):
        Session(family, budget=minimum - 1).feed(list(moving(2)))


def test_too_large_a_budget_is_fine() -> None:
    session = Session(tiny("qwen2_5_vl"), budget="256MiB")
    session.feed(list(moving(6)))
    assert session.usage.peak_bytes <= 256 << 20
    assert session.usage.compactions == 0


def test_reanchoring_stays_under_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen2_5_vl", max_position_embeddings=120)
    session = Session(family, budget="300KiB", positions="contiguous")
    peaks = []
    import millpond.cache.rerotation as module

    for name in ("close_gaps", "shift_uniformly"):
        original = getattr(module, name)

        def measured(*args: object, original: object = original, **kwargs: object) -> object:
            result: list[object] = []
            held = held_bytes(session)
            peak = transient_peak(lambda: result.append(original(*args, **kwargs)))  # type: ignore[operator]
            peaks.append(peak)
            assert held + peak <= 300 << 10
            assert peak <= session.plan.scratch_bytes
            return result[0]

        monkeypatch.setattr(module, name, measured)
    session.feed(list(moving(200, fps=1)))
    assert len(peaks) >= 2
