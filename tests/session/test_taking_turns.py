"""Turns and frames that take turns behind the memory: faults at every line, in any thread, and the scratch that it takes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from millpond import MillpondError, Session
from millpond.memory.lines import Line
from tests.nightly import nightly
from tests.session import faults
from tests.session.measure import transient_peak
from tests.session.test_faults import QUESTION, check_books, check_locks, state_of
from tests.session.test_watching_while_answering import KINDS, answering, asked, filled, news, until


def tokens_of(session: Session) -> tuple[list[bytes], list[bytes]]:
    """What a stream with a running turn holds behind the memory, bit for bit: the stream's tokens and the turn's."""
    pond = session._runner.pond
    assert pond.turn is not None
    live, parked = [], []
    for layer, ahead in zip(pond.storage.layers, pond.storage.ahead, strict=True):
        for tensor in layer.tensors():
            live.append(tensor[:, pond.turn.start + ahead : layer.length].numpy().tobytes())
            parked.append(tensor[:, layer.capacity - pond.turn.parked :].flip(1).numpy().tobytes())
    return (parked, live) if pond.turn.in_front else (live, parked)


@pytest.mark.parametrize(
    ("policy", "error"),
    nightly(
        [
            (policy, error)
            for policy in ("cake+cake", "mikv:group=8:full_share=0.4:base=h2o")
            for error in (KeyboardInterrupt, MemoryError, ValueError)
        ],
        but=[("cake+cake", KeyboardInterrupt), ("cake+cake", MemoryError)],
    ),
)
def test_a_fault_at_any_line_of_taking_turns(
    policy: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was to come to the front does or does not; nobody loses a token, and the next to come finds everything."""
    modules = "millpond.cache.storage.base", "millpond.cache.storage.reflection", "millpond.memory.resumable"
    monkeypatch.setattr(faults, "FILES", faults.FILES | faults.files_of(*modules))
    name, options = KINDS[policy]
    session = filled(policy, name, **options)
    quiet = session.fork()
    at_rest = list(asked(session.fork(), 4))
    answer = asked(session, 4)
    pieces = [next(answer)]
    for one in (session, quiet):
        one.feed(news(2))
    pond = session._runner.pond
    monkeypatch.setattr(pond, "plan", replace(pond.plan, lines=tuple(small(line) for line in pond.plan.lines)))
    pond.bring_turn()
    for bring, back in ((pond.bring_stream, pond.bring_turn), (pond.bring_turn, pond.bring_stream)):
        expected, seen = tokens_of(session), set()
        assert all(map(all, expected))
        for line in faults.lines_of(bring):
            back()
            assert faults.raise_at(line, error, bring), line
            assert not pond.moving
            assert tokens_of(session) == expected, line
            assert pond.turn is not None
            seen.add(pond.turn.in_front)
            check_books(session)
        assert seen == {True, False}
        bring()
    pieces += answer
    assert pieces == at_rest
    assert state_of(session) == state_of(quiet)


def small(line: Line) -> Line:
    """The scratch that lets a few rows of one head move at a time."""
    return replace(line, bytes=1200) if line.name == "scratch" else line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("thread", "every"),
    nightly([(False, 4), (True, 8), (False, 1), (True, 1)], but=[(False, 4), (True, 8)]),
)
def test_a_fault_at_any_line_of_an_answer_beside_a_stream(thread: bool, every: int) -> None:
    """In the thread that asks, and in one of its own: the stream is as if it had not been asked."""
    base = filled("infinipot-v", "qwen2_5_vl")

    def begun() -> tuple[Session, Callable[[], object]]:
        session = base.fork()
        if thread:
            session.feed(news(2))
            return session, lambda: session.begin(QUESTION, max_new_tokens=2).result(60)
        answer = asked(session, 3)
        next(answer)
        session.feed(news(2))
        return session, lambda: list(answer)

    session, run = begun()
    lines = faults.lines_of(run)
    quiet = state_of(session)
    assert len(lines) > 60
    raised = 0
    for line in lines[::every]:
        session, run = begun()
        with suppress(MillpondError):  # where the fault strikes what was to tell of the end
            raised += faults.raise_at(line, KeyboardInterrupt, run)
        until(lambda: not answering())
        session.feed([])  # whoever comes next ends what could not be ended
        session.ask(QUESTION, max_new_tokens=1)
        assert state_of(session) == quiet, line
        check_locks(session)
    # In its own thread a fault behind the end reaches nobody.
    assert raised > len(lines) // every - (10 if thread else 1)


@pytest.mark.parametrize("policy", ["cake+cake", "mikv:group=8:full_share=0.4:base=h2o"])
@pytest.mark.parametrize("share", [1.0, 0.02])
def test_taking_turns_needs_no_scratch_that_is_not_planned(
    policy: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = KINDS[policy]
    session = filled(policy, name, **options)
    answer = asked(session, 30)
    for _ in range(20):
        next(answer)
    session.feed(news(2))
    pond = session._runner.pond
    lines = [
        replace(line, bytes=int(line.bytes * share)) if line.name == "scratch" else line for line in pond.plan.lines
    ]
    monkeypatch.setattr(pond, "plan", replace(pond.plan, lines=tuple(lines)))
    held = pond.ledger.held
    for bring in (pond.bring_turn, pond.bring_stream):
        assert 0 < transient_peak(bring) <= pond.plan.scratch_bytes
        assert pond.ledger.held == held
    assert pond.plan.scratch_bytes >= 2 * pond.geometry.vector_bytes
