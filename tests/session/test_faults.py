"""Whatever is raised at whatever line, a turn or a block of frames is wholly in, or as if it had not begun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from millpond import PolicyError, Session
from millpond.cache.storage.mixed_precision_layer import MixedPrecisionLayer
from millpond.models.base import Family
from millpond.policies.base import Needs, Policy, View, keep_top
from millpond.standing.asking import Stream, ask_together
from millpond.stream.step import Step
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session import faults
from tests.session.faults import lines_of, raise_at
from tests.session.frames import moving

QUESTION = "which one"


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny("qwen2_5_vl")


def filled(family: Family, policy: str | Policy, frames: int, share: float = 1.6, **options: object) -> Session:
    """A session that has compacted a few times, with an odd frame waiting if `frames` is odd."""
    probe = Session(family, budget="1MiB", policy=policy, **options)  # type: ignore[arg-type]
    group = probe.plan_for(56, 56)
    slots = group.prompt_tokens + 6 * group.group_tokens + 40
    session = Session(
        family, budget=int(slots * group.bytes_per_token * share) + group.waiting_bytes, policy=policy, **options
    )  # type: ignore[arg-type]
    session.feed(list(moving(frames)))
    assert session.usage.compactions > 0
    return session


def memory_of(session: Session) -> list[object]:
    """Everything in the pond and on the clock, bit for bit."""
    runner, pond = session._runner, session._runner.pond
    admitted = {} if runner.admission_state is None else vars(runner.admission_state)
    seen = [part.numpy().tobytes() if isinstance(part, torch.Tensor) else part for part in admitted.values()]
    parts: list[object] = [repr(runner.clock), runner.tokens, seen, pond.recent, pond.compactions]
    parts += [
        list(pond.queries.counts),
        *(pond.queries.layer(index).numpy().tobytes() for index in range(len(pond.layers))),
    ]
    for layer in pond.layers:
        parts.append((layer.length, layer.capacity))
        parts += [live[:, : layer.length].numpy().tobytes() for live in layer.tensors()]
        if isinstance(layer, MixedPrecisionLayer):
            parts += [
                layer.store.live(name).numpy().tobytes() for name in ("time_us", "positions", "accumulated_attention")
            ]
    return parts


def state_of(session: Session) -> list[object]:
    """The same, and what waits in front of it, and the books."""
    at, ledger = session._ingest.at, session._runner.pond.ledger
    waiting = [(time, frame.tobytes()) for time, frame in at.waiting]
    recent = [[(time, frame.tobytes()) for time, frame in group] for group in session._ingest.state().recent]
    counts = at.video_open, at.last_us, at.interval_us, at.frames, at.dropped
    return [*memory_of(session), waiting, recent, counts, {key: size for key, size in ledger._accounts.items() if size}]


def check_books(session: Session) -> None:
    at, ledger = session._ingest.at, session._runner.pond.ledger
    assert ledger.account("waiting frames") == sum(frame.nbytes for _, frame in at.waiting)
    assert ledger.account("undo") == ledger.account("scratch") == 0


def check_locks(session: Session) -> None:
    """Nobody is at the stream any more."""
    access = session._runner.access
    for lock in (access.stream, access.turn, access.instant, session._feeding):
        assert lock._last is None or not lock._last.present.locked()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "remember", "error"),
    nightly(
        [("streammem", True, ValueError), ("streammem", True, KeyboardInterrupt), ("recent", False, KeyboardInterrupt)],
        but=[("streammem", True, KeyboardInterrupt)],
    ),
)
def test_a_fault_at_any_line_of_a_turn(family: Family, policy: str, remember: bool, error: type[BaseException]) -> None:
    base = filled(family, policy, 31, recent_frames=2)

    def turn(session: Session) -> Callable[[], object]:
        return lambda: session.ask(QUESTION, max_new_tokens=2, remember=remember)

    twin = base.fork()
    before = state_of(base)
    lines = lines_of(turn(twin))
    after = state_of(twin)
    assert (after != before) == remember
    outcomes = set()
    for line in lines:
        session = base.fork()
        assert raise_at(line, error, turn(session)), line
        found = state_of(session)
        assert found in (before, after), line
        outcomes.add(found == after)
        check_books(session)
        check_locks(session)
    assert len(lines) > 100
    assert outcomes == {True, not remember}, "both ends were seen"


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_standing_questions(family: Family) -> None:
    base = filled(family, "recent", 31, recent_frames=2)

    def turn(session: Session) -> Callable[[], object]:
        stream = Stream(session._runner, session._ingest, lambda: session.usage)
        return lambda: ask_together(stream, [(QUESTION, 2), ("and before", 2)])

    before, twin = state_of(base), base.fork()
    lines = lines_of(turn(twin))
    assert state_of(twin) == before
    for line in lines:
        session = base.fork()
        assert raise_at(line, KeyboardInterrupt, turn(session)), line
        assert state_of(session) == before, line
        check_books(session)
        assert not session._runner.access.mine
    assert len(lines) > 100


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "error"), [("infinipot-v", KeyboardInterrupt), ("h2o", ValueError)])
def test_a_fault_at_any_line_of_a_block(family: Family, policy: str, error: type[BaseException], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    base = filled(family, policy, 30, share=1.0 if policy == "h2o" else 0.9, admission="curvestream")
    base.ask(QUESTION, max_new_tokens=2, remember=True)  # so that the next block opens the video again
    frames = list(moving(2, start=40, seed=1))
    points: list[list[object]] = []
    begin, commit = Step.__init__, Step.commit

    def begun(step: Step, *args: object, **kwargs: object) -> None:
        points.append(memory_of(twin))
        begin(step, *args, **kwargs)  # type: ignore[arg-type]

    def committed(step: Step) -> None:
        points.append(memory_of(twin))
        commit(step)

    twin = base.fork()
    points.append(memory_of(twin))
    with monkeypatch.context() as patched:
        patched.setattr(Step, "__init__", begun)
        patched.setattr(Step, "commit", committed)
        twin.feed(frames)
    odd = base.fork()
    odd.feed(frames[:1])  # makes room for a question about it
    room = memory_of(odd)
    start = base._ingest.at
    counting = base.fork()
    lines = lines_of(lambda: counting.feed(frames))
    for number, line in enumerate(lines):
        session = base.fork()
        assert raise_at(line, error, lambda session=session: session.feed(frames)), line  # type: ignore[misc]
        memory, at = memory_of(session), session._ingest.at
        assert memory in [*points, room], line
        check_books(session)
        lost = at.dropped - start.dropped + len(at.waiting)
        assert at.frames - start.frames - lost == (2 if memory == points[-1] else 0), line
        assert at.video_open == (memory in points[2:]), line
        check_locks(session)
        if number % 10 == 0:
            session.feed(list(moving(2, start=60, seed=2)))
            assert session._ingest.at.frames == at.frames + 2
    assert len(lines) > 80
    assert len(points) >= 5, "the turn's end, the reopening and the block"


def test_a_fault_at_any_line_of_the_proxy(family: Family, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The template's tokens, run before a compaction for their queries alone, are gone again wherever that is interrupted."""
    moves = faults.files_of("millpond.cache.storage.base", "millpond.memory.resumable")
    monkeypatch.setattr(faults, "FILES", faults.FILES | moves)
    session = filled(family, "streammem", 30)

    def stored() -> list[object]:
        return [
            repr(session._runner.clock),
            *(layer.time_us[:, : layer.length].tolist() for layer in session._runner.pond.layers),
        ]

    before = stored()
    for line in lines_of(session._runner.ask_proxy):
        assert raise_at(line, KeyboardInterrupt, session._runner.ask_proxy), line
        assert stored() == before, line


@dataclass(frozen=True)
class Failing(Policy):
    """Recency that fails from a given pass on, at one layer."""

    name: ClassVar[str] = "failing"
    source: ClassVar[str] = "tests"
    layer: int = 0
    armed: ClassVar[bool] = False

    def keep(self, view: View, slots: int) -> torch.Tensor:
        if self.armed and view.layer == self.layer:
            raise PolicyError("the policy failed")
        return keep_top(torch.arange(view.tokens).float().repeat(view.heads, 1), view.protected, slots)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_policy_that_fails_behind_a_remembered_turn(family: Family, layer: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    session = filled(family, Failing(layer), 31)
    before = state_of(session)
    monkeypatch.setattr(Failing, "armed", True)
    with pytest.raises(PolicyError, match="the policy failed"):
        session.ask(QUESTION, max_new_tokens=4, remember=True)
    pond, clock = session._runner.pond, session._runner.clock
    if pond.compactions == before[4]:
        assert state_of(session) == before
    else:  # the pass was finished by recency: the turn is in, and the clock behind it
        assert not session._ingest.at.video_open
    last = max(int(one.positions[:, : one.length].max()) for one in pond.layers)
    assert last == clock.next - 1 or session._ingest.at.video_open
    monkeypatch.setattr(Failing, "armed", False)
    session.feed(list(moving(4, start=40)))
    assert session.ask(QUESTION, max_new_tokens=2) is not None


@dataclass(frozen=True)
class Starved(Policy):
    """Recency that merges, for which there is no memory a few times."""

    name: ClassVar[str] = "starved"
    source: ClassVar[str] = "tests"
    needs: ClassVar[Needs] = Needs(merging=True)
    refusals: ClassVar[int] = 0

    def keep(self, view: View, slots: int) -> torch.Tensor:
        return keep_top(torch.arange(view.tokens).float().repeat(view.heads, 1), view.protected, slots)

    def merge(self, view: View, keep: torch.Tensor) -> None:
        if Starved.refusals:
            Starved.refusals -= 1
            raise MemoryError("injected")


def test_a_compaction_behind_a_remembered_turn_that_is_finished_later(family: Family, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What is pending when the turn is given up will be finished with the turn in it: the clock stays behind it."""
    session = filled(family, Starved(), 31)
    compactions = session.usage.compactions
    monkeypatch.setattr(Starved, "refusals", 2)  # the move and its second try; then there is memory again
    with pytest.raises(MemoryError, match="injected"):
        session.ask(QUESTION, max_new_tokens=4, remember=True)
    assert session.usage.compactions == compactions + 1
    assert not session._ingest.at.video_open
    runner = session._runner
    assert max(int(one.positions[:, : one.length].max()) for one in runner.pond.layers) == runner.clock.next - 1
    check_books(session)


def test_a_step_whose_taking_back_is_interrupted_is_taken_back_by_the_next_call(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Ctrl-C: the second while the first one's turn is put back."""
    session, twin = filled(family, "infinipot-v", 30), filled(family, "infinipot-v", 30)
    pond = session._runner.pond
    truncate = pond.truncate

    def interrupted(length: int) -> None:
        monkeypatch.setattr(pond, "truncate", truncate)
        raise KeyboardInterrupt

    pieces = session.answering(QUESTION, max_new_tokens=8, remember=True)(
        lambda: None, lambda: None
    )  # as `ask` runs it
    next(pieces)
    monkeypatch.setattr(pond, "truncate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    assert pond.length > twin._runner.pond.length
    for one in (session, twin):
        one.feed(list(moving(6, start=200)))
    assert memory_of(session) == memory_of(twin)
    assert session.ask(QUESTION, max_new_tokens=4).text == twin.ask(QUESTION, max_new_tokens=4).text
