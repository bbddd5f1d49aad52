"""Frames go on while an answer is generated: the answer and the stream are bit for bit what they are without each other."""

import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch

from millpond import Answer, BudgetError, MillpondError, PendingAnswer, Session
from millpond.frames import Frame
from millpond.models.base import Family
from millpond.stream.exclusive import Exclusive
from millpond.stream.generate import TextPieces
from millpond.stream.holding import _waits
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes
from tests.session.test_faults import check_books, check_locks, state_of

QUESTION = "which one"
# One of each kind of storage, and of each way in which a stream's tokens or queries are looked at.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "infinipot-v": ("qwen2_5_vl", {"recent_frames": 3, "admission": "curvestream"}),
    "h2o": ("qwen2_vl", {}),
    "streammem": ("qwen3_vl", {"positions": "absolute"}),
    "cake+cake": ("llava_onevision", {}),
    "mikv:group=8:full_share=0.4:base=h2o": ("qwen2_5_vl", {"recent_frames": 2}),
    "rekv": ("llava_next_video", {"host_budget": "1MiB"}),
    "full": ("qwen2_5_vl", {}),
}


def lively(family: Family) -> Family:
    """Whose answers do not end by themselves."""
    family.stop_ids = frozenset()
    return family


def filled(policy: str, name: str, **options: Any) -> Session:
    """A session that has just compacted, with headroom for a few frames, and an odd frame waiting where frames go in pairs."""
    family, budget = lively(tiny(name)), 100_000
    while True:
        try:
            session = Session(family, budget=budget, policy=policy, reserve_tokens=64, **options)
            plan = session.plan_for(56, 56)
            if policy == "full" or plan.headroom_tokens >= 4 * plan.group_tokens:
                break
        except BudgetError:
            pass
        budget += 20_000
    session.feed(list(moving(3, fps=1)))
    for at in range(4, 2000, 2):
        before = session.usage.compactions
        session.feed(list(moving(2, start=at, fps=1, seed=at)))
        if (policy == "full" and at > 40) or 1 <= before < session.usage.compactions:
            return session
    raise AssertionError("it never compacted")


def fits(session: Session) -> bool:
    """Whether a group of frames can go in, and another wait, without waiting for a turn."""
    return not _waits(session._runner, 2 * session.plan.group_tokens)


def asked(session: Session, limit: int, *, remember: bool = False) -> Iterator[str]:
    """An answer that goes on when the caller says so, in this thread."""
    return session._answer(QUESTION, limit, remember, lambda: None, lambda: None)


def recorded(session: Session, steps: Iterator[str]) -> Iterator[tuple[str, list[bytes]]]:
    """The pieces of an answer, each with the logits from which it came."""
    logits, seen = session.family.logits, []

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = logits(hidden)
        seen.append(scores.numpy().tobytes())
        return scores

    while True:
        session.family.logits = noted  # type: ignore[method-assign]
        seen.clear()
        try:
            piece = next(steps)
        except StopIteration:
            return
        finally:
            session.family.logits = logits  # type: ignore[method-assign]
        yield piece, list(seen)


@pytest.mark.parametrize(
    "policy", nightly(list(KINDS), but=[kind for kind in KINDS if kind not in ("h2o", "streammem")])
)
def test_an_answer_and_a_stream_do_not_see_each_other(policy: str) -> None:
    name, options = KINDS[policy]
    session = filled(policy, name, **options)
    alone, quiet = session.fork(), session.fork()
    at_rest = list(recorded(alone, asked(alone, 12)))
    frames = news(8)
    compactions, met = session.usage.compactions, []
    asking = asked(session, 12)
    watching = []
    for piece in recorded(session, asking):
        watching.append(piece)
        if frames and fits(session):
            frame = frames.pop(0)
            session.feed(frame)
            quiet.feed(frame)
        turn = session._runner.pond.turn
        assert turn is not None
        met.append((turn.in_front, turn.parked > 0))
        assert held_bytes(session, but=session._runner.pond.host) <= session._runner.pond.ledger.held
    assert watching == at_rest
    assert (False, True) in met, "the stream ran while the turn was parked"
    assert (True, True) in met, "the turn ran while the stream's new tokens were parked"
    assert session.usage.compactions == compactions
    assert session._runner.pond.turn is None
    assert state_of(session) == state_of(quiet)
    check_books(session)
    more = list(moving(30, start=6000, seed=8, fps=1))
    for one in (session, quiet):
        one.feed(more)
    assert policy == "full" or session.usage.compactions > compactions
    assert state_of(session) == state_of(quiet)
    assert session.ask(QUESTION, max_new_tokens=4).token_ids == quiet.ask(QUESTION, max_new_tokens=4).token_ids


class Gate:
    """Lets the answers of a session go on token by token, whichever thread they run in; nothing is held meanwhile."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes, self._generate = threading.Semaphore(0), session._answer
        self.tokens = 0
        monkeypatch.setattr(session, "_answer", self._gated)

    def _gated(self, *arguments: Any) -> Generator[str, None, Answer]:
        pieces = self._generate(*arguments)
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                self.tokens += 1
                assert self._passes.acquire(timeout=60)
                yield piece
        finally:
            pieces.close()

    def open(self, count: int = 1000) -> None:
        self._passes.release(count)


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.002)


def queued(lock: Exclusive) -> bool:
    """Whether somebody waits for a lock that another holds."""
    last = lock._last
    return last is not None and last.before is not None and last.present.locked()


def answering() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "millpond-answer"]


@pytest.fixture(scope="module")
def base() -> Session:
    return filled("infinipot-v", "qwen2_5_vl")


@pytest.fixture
def session(base: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    # So that every token is a piece.
    monkeypatch.setattr(TextPieces, "_decode", lambda pieces: " ".join(map(str, pieces._ids)))
    yield base.fork()
    until(lambda: not answering())


def news(count: int) -> list[Frame]:
    return list(moving(count, start=5000, seed=7, fps=1))


def test_a_compaction_that_is_due_waits_for_the_answer_and_questions_and_looks_do_not(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, later = session.fork(), session.fork()
    at_rest = session.ask(QUESTION, max_new_tokens=9)
    gate = Gate(session, monkeypatch)
    first = session.begin(QUESTION, max_new_tokens=9)
    until(lambda: gate.tokens == 1)
    frames = news(41)
    feeder = threading.Thread(target=session.feed, args=(frames,))
    feeder.start()
    until(lambda: queued(session._runner.access.turn))
    seen = session.usage
    assert 2 < seen.frames_seen - quiet.usage.frames_seen < 30
    assert seen.compactions == quiet.usage.compactions
    assert session.memory()[0].seconds.max() >= 5000
    assert session.plan == quiet.plan
    second = session.begin(QUESTION, max_new_tokens=3)  # behind the compaction, and so behind the frame that needs it
    assert not first.done
    gate.open()
    assert first.result(60).token_ids == at_rest.token_ids
    feeder.join(60)
    quiet.feed(frames)
    so_far = seen.frames_seen - later.usage.frames_seen  # the last of these fills the block that waits
    later.feed(frames[:so_far])
    assert later.usage.compactions > seen.compactions
    assert second.result(60).token_ids == later.ask(QUESTION, max_new_tokens=3).token_ids
    later.feed(frames[so_far:])
    assert state_of(session) == state_of(quiet)
    assert state_of(later) == state_of(quiet)


def test_what_touches_the_memory_as_a_whole_waits_and_then_does_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_rest = session.ask(QUESTION, max_new_tokens=5).token_ids
    budget = session.plan.total_bytes + 60_000
    gate = Gate(session, monkeypatch)
    answer = session.begin(QUESTION, max_new_tokens=5)
    done: list[str] = []

    def grow() -> None:
        session.resize(budget)
        done.append("resize")

    def copy() -> None:
        assert session.fork().plan.budget == budget
        done.append("fork")

    def keep() -> None:
        session.ask(QUESTION, max_new_tokens=2, remember=True)
        done.append("remember")

    threads = []
    for work in (grow, copy, keep):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        until(lambda: queued(session._runner.access.stream if threads[1:] else session._runner.access.turn))
        waiting = session._runner.access.stream._last
        until(lambda waiting=waiting: session._runner.access.stream._last is waiting)  # type: ignore[misc]
    assert done == []
    gate.open()
    for thread in threads:
        thread.join(60)
    assert done == ["resize", "fork", "remember"], "first come, first served"
    assert answer.result(60).token_ids == at_rest


def test_questions_at_once_are_answered_in_turn(session: Session) -> None:
    expected = session.ask(QUESTION, max_new_tokens=6).token_ids
    before = state_of(session)
    answers = [session.begin(QUESTION, max_new_tokens=6) for _ in range(5)]
    pieces = ["".join(answer) for answer in answers]
    assert [answer.result(60).token_ids for answer in answers] == [expected] * 5
    assert pieces == [answer.result().text for answer in answers] == ["".join(answer) for answer in answers]
    assert state_of(session) == before


def test_an_answer_that_nobody_reads_ends_by_itself(session: Session) -> None:
    before = state_of(session)
    answer = session.begin(QUESTION, max_new_tokens=40)
    assert answer.wait(60)
    assert answer.done
    assert state_of(session) == before
    assert len(answer.result().token_ids) == 40
    pieces = session.stream(QUESTION, max_new_tokens=40)
    first = next(pieces)  # and then the reader goes for a walk
    session.feed(news(41))
    assert first + "".join(pieces) == answer.result().text
    with pytest.raises(MillpondError, match="max_new_tokens must be at least 1"):
        session.begin(QUESTION, max_new_tokens=0)


@pytest.mark.parametrize("how", ["drop", "drop the iterator", "cancel", "close", "throw"])
def test_an_answer_that_is_given_up_gives_its_slots_back(
    session: Session, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = session.fork()
    gate = Gate(session, monkeypatch)
    pieces: Iterator[str] | None
    answer: PendingAnswer | None = None
    if how in ("close", "throw"):
        pieces = session.stream(QUESTION, max_new_tokens=50)
    else:
        answer = session.begin(QUESTION, max_new_tokens=50)
        pieces = iter(answer)
    gate.open(3)
    next(pieces)
    until(lambda: gate.tokens == 4)
    for one in (session, quiet):
        one.feed(news(2))
    queue = session.begin(QUESTION, max_new_tokens=50)
    if how.startswith("drop"):
        if how == "drop":
            pieces = None
        answer = pieces = None
        gc.collect()
    elif answer is not None:
        answer.cancel()
    queue.cancel()
    assert queue.done
    threading.Timer(0.05, gate.open).start()
    if isinstance(pieces, Generator) and answer is None:
        with pytest.raises(KeyboardInterrupt) if how == "throw" else nullcontext():
            pieces.throw(KeyboardInterrupt()) if how == "throw" else pieces.close()
    for given_up in (queue, answer):
        if given_up is not None:
            with pytest.raises(MillpondError, match="the answer was cancelled"):
                given_up.result(60)
    until(lambda: not answering())
    assert gate.tokens <= 5
    assert state_of(session) == state_of(quiet)
    check_locks(session)


def test_an_answer_that_fails_says_so_and_harms_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(session)
    with pytest.raises(BudgetError, match="would do"):
        session.begin("word " * 5000).result(60)
    forward, calls = session.family.forward, []

    def fails(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(session.family, "forward", fails)
    answer = session.begin(QUESTION, max_new_tokens=9)
    read: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        read.extend(answer)
    assert list(islice(answer, 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        answer.result()
    monkeypatch.undo()
    assert state_of(session) == before
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        session.begin(QUESTION, max_new_tokens=50).result(0)


def test_an_answer_may_claim_all_that_is_free_and_frames_wait_for_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the reserve, as it always could be: then it takes headroom too."""
    at_rest = session.ask(QUESTION, max_new_tokens=10_000)
    assert len(at_rest.token_ids) > session.plan.reserve_tokens - 20
    gate = Gate(session, monkeypatch)
    answer = session.begin(QUESTION, max_new_tokens=10_000)
    feeder = threading.Thread(target=session.feed, args=(news(12),))
    feeder.start()
    until(lambda: queued(session._runner.access.turn))
    gate.open()
    assert answer.result(60).token_ids == at_rest.token_ids
    feeder.join(60)
    assert session.usage.frames_dropped == 0


@pytest.mark.parametrize("remember", [False, True])
def test_a_question_in_the_middle_of_a_feed_is_shown_the_frames_that_wait(session: Session, remember: bool) -> None:
    """Also where they and the question are more than what is free: the compaction that they need comes a little earlier."""
    quiet, most = session.fork(), session.plan.reserve_tokens - 23 - 3  # beside the question and its answer
    shown = []

    def source() -> Iterator[Frame]:
        for frame in news(33):
            yield frame
            free = session._runner.pond.free - session.plan.reserve_tokens
            waiting = -(-len(session._ingest.at.waiting) // 2) * session.plan.group_tokens
            if not shown and waiting > free + most:
                shown.append(waiting)
                session.ask(QUESTION, max_new_tokens=2, remember=remember)

    session.feed(source())
    assert shown
    if not remember:
        quiet.feed(news(33))
        assert state_of(session) == state_of(quiet)
