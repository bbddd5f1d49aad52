"""The latest frames once more, under the cap: what is planned for them, held at every step, forked and shrunk."""

from collections.abc import Callable

import pytest
import torch

from millpond import BudgetError, Session
from millpond.cache.pond import Pond
from millpond.models.base import Family
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes, transient_peak
from tests.session.test_recent_frames import QUESTION, N, minimum, shown, tight, times_of, whole_state


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")


class Measured:
    """Holds every forward and compaction to the cap, by the ledger and by a walk over the session's objects."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.looks, self.cuts = session, 0, 0
        forward, compact, cut = session.family.forward, Pond.compact, Pond.cut

        def looked(*args: object) -> torch.Tensor:
            self.look()
            hidden: torch.Tensor = forward(*args)  # type: ignore[arg-type]
            self.look()
            return hidden

        def compacted(pond: Pond, slots: int) -> None:
            self.within_scratch(pond, lambda: compact(pond, slots))

        def shortened(pond: Pond, start: int, count: int) -> None:
            self.cuts += count > 0
            self.within_scratch(pond, lambda: cut(pond, start, count))

        monkeypatch.setattr(session.family, "forward", looked)
        monkeypatch.setattr(Pond, "compact", compacted)
        monkeypatch.setattr(Pond, "cut", shortened)

    def within_scratch(self, pond: Pond, run: Callable[[], None]) -> None:
        held = held_bytes(self.session)
        peak = transient_peak(
            lambda: (run(), torch.empty(1))
        )  # a cut may allocate nothing, and no event at all is an error
        assert peak <= pond.plan.scratch_bytes
        assert held + peak <= max(pond.plan.budget or 0, self.session.plan.budget or 0)
        self.look()

    def look(self) -> None:
        self.looks += 1
        ledger = self.session._runner.pond.ledger
        assert held_bytes(self.session) <= ledger.held <= self.session.plan.budget  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "dtype"),
    nightly(
        [
            ("qwen2_5_vl", "infinipot-v", torch.float32),
            ("qwen3_vl", "h2o", torch.bfloat16),
            ("qwen2_vl", "mikv", torch.float32),
            ("llava_next_video", "streammem", torch.float32),
            ("llava_onevision", "keydiff+diversity", torch.float32),
        ],
        but=[("qwen3_vl", "h2o", torch.bfloat16), ("qwen2_vl", "mikv", torch.float32)],
    ),
)
def test_the_cap_holds_at_every_step(
    name: str, policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name, dtype=dtype)
    session = tight(family, policy=policy)
    measured = Measured(session, monkeypatch)
    session.feed(list(moving(31)))
    for _ in range(2):
        session.ask(QUESTION, max_new_tokens=10_000)
        session.ask(QUESTION, max_new_tokens=10_000, remember=True)
        session.ask(QUESTION, max_new_tokens=2)
        session.feed(list(moving(20, start=session.usage.stream_seconds + 1)))
    assert session.usage.peak_bytes <= session.plan.budget  # type: ignore[operator]
    size, _ = next(iter(session._ingest.state().recent))[0][1].shape[:2]
    assert session._runner.pond.ledger.account("recent pixels") == session.plan.recent_bytes == N * size * size * 3
    budget = session.plan.budget
    assert budget is not None
    session.resize(budget * 2)
    session.feed(list(moving(24, start=80)))
    session.ask(QUESTION, max_new_tokens=4)
    session.resize(budget)
    assert held_bytes(session) <= session.usage.allocated_bytes <= budget
    session.ask(QUESTION, max_new_tokens=4)
    assert measured.looks > 50
    assert measured.cuts == 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_the_least_budget_works_and_one_byte_less_does_not(name: str) -> None:
    family = tiny(name)
    budget = minimum(family, recent_frames=N)
    assert budget > minimum(family)
    plan = Session(family, budget=budget, recent_frames=N).plan_for(56, 56)
    groups = N // family.frames_per_group
    assert plan.recent_tokens == groups * plan.group_tokens + len(family.reopening())
    assert plan.turn_tokens == plan.reserve_tokens - plan.recent_tokens == 32
    assert plan.total_bytes <= budget
    session = Session(family, budget=budget, recent_frames=N)
    session.feed(list(moving(51)))
    session.ask("now", max_new_tokens=2)
    session.ask("now", max_new_tokens=2, remember=True)
    session.ask("now", max_new_tokens=2)
    assert session.usage.peak_bytes <= budget
    with pytest.raises(BudgetError, match="the minimum that works") as caught:
        Session(family, budget=budget - 1, recent_frames=N).feed(list(moving(2)))
    assert "\n" not in str(caught.value)


def test_a_fork_has_frames_of_its_own(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(41)))
    other = session.fork()
    assert whole_state(other) == whole_state(session)
    assert other.usage.allocated_bytes == session.usage.allocated_bytes
    before, answer = whole_state(session), session.ask(QUESTION, max_new_tokens=6).token_ids
    assert other.ask(QUESTION, max_new_tokens=6).token_ids == answer
    other.feed(list(moving(9, start=30, seed=4)))
    assert whole_state(session) == before
    assert whole_state(other) != before
    assert held_bytes(other) <= other.usage.allocated_bytes


def test_a_smaller_budget_keeps_the_second_look(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(qwen, budget="2MiB", recent_frames=N)
    session.feed(list(moving(40)))
    fewest = minimum(qwen, recent_frames=N)
    with pytest.raises(BudgetError, match="minimum that works"):
        session.resize(fewest - 1)
    session.resize(fewest)
    parts = shown(session, monkeypatch)
    session.ask("now", max_new_tokens=2)
    assert times_of(parts) == [18.0, 19.0]
    assert session.usage.peak_bytes <= 2 << 20
    assert session.usage.allocated_bytes <= fewest
