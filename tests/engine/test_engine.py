"""An engine's sessions: how bytes go round, what is refused, and that nobody harms anybody."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millpond import BudgetError, Engine, MillpondError, Session, SessionConfig, SnapshotError, SourceError
from millpond.device import minimum_budget
from millpond.engine import EngineSession
from millpond.frames import Frame
from millpond.models import Family
from millpond.policies.methods.keydiff import KeyDiff
from tests.models.tiny import tiny
from tests.session.frames import moving

QUESTION = "what is there now"
SIZE = (56, 56)


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="module")
def least(family: Family) -> int:
    """The fewest bytes that a session works with."""
    return minimum_budget(family, family.grid(*SIZE), SessionConfig())


Made = Callable[..., Engine]


@pytest.fixture
def made(family: Family, tmp_path: Path) -> Iterator[Made]:
    """An engine of so many bytes for sessions; after the test no thread and no file of it is left."""
    engines: list[Engine] = []
    before = set(threading.enumerate())

    def make(size: int, **more: Any) -> Engine:
        queue = more.pop("queue_memory", 64 << 10)
        engine = Engine(
            more.pop("family", family),
            stream_memory=size + queue,
            queue_memory=queue,
            state_dir=tmp_path,
            frame_size=SIZE,
            **{"patience": 1.0, **more},
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
    assert set(threading.enumerate()) <= before
    assert list(tmp_path.iterdir()) == []


def held(engine: Engine) -> dict[str, int]:
    return {session.name: session.status.bytes for session in engine}


# --- bytes --------------------------------------------------------------------------------------------------------


def test_newcomers_shrink_the_others_alike_and_who_is_used_grows_into_what_comes_free(made: Made, least: int) -> None:
    engine = made(6 * least)
    one = engine.open("one")
    one.feed(moving(24))
    assert held(engine) == {"one": 6 * least}
    two, three = engine.open("two"), engine.open("three")
    assert held(engine) == {"one": 2 * least, "two": 2 * least, "three": 2 * least}
    assert one.usage.budget_bytes == 2 * least
    two.close()
    one.ask(QUESTION, max_new_tokens=2)
    three.ask(QUESTION, max_new_tokens=2)
    assert held(engine) == {"one": 3 * least, "three": 3 * least}
    assert one.usage.budget_bytes == 3 * least


def test_weights_count_and_nobody_goes_below_its_least(made: Made, least: int) -> None:
    engine = made(8 * least, share="weight")
    engine.open("light")
    engine.open("heavy", weight=3)
    assert held(engine) == {"heavy": 6 * least, "light": 2 * least}
    engine.open("stubborn", least=5 * least)
    assert held(engine)["stubborn"] == 5 * least
    assert sum(held(engine).values()) <= 8 * least
    assert min(held(engine).values()) >= least


def test_what_does_not_fit_is_refused_by_name_with_what_is_free_and_needed(made: Made, least: int) -> None:
    engine = made(4 * least, patience=0.05)
    busy = engine.open("busy", least=3 * least)
    frames, gate = moving(4), threading.Event()

    def slow() -> Iterator[Frame]:
        yield next(frames)
        assert gate.wait(10)

    feeding = threading.Thread(target=busy.feed, args=(slow(),))
    feeding.start()
    while busy.status.bytes and not busy.usage.frames_seen:
        pass
    with pytest.raises(BudgetError) as refused:
        engine.open("late", least=2 * least)
    said = str(refused.value)
    assert "'late'" in said
    assert f"{2 * least} bytes" in said
    assert "are free" in said
    assert refused.value.minimum == 2 * least
    assert [session.name for session in engine] == ["busy"]
    gate.set()
    feeding.join()
    engine.open("late", least=2 * least)  # "busy" is idle now, and hibernated
    assert not busy.status.in_memory
    assert busy.usage.frames_seen == 1


def test_fixed_bytes_never_change_and_idle_sessions_go_first_used_last_to_stay(made: Made, least: int) -> None:
    engine = made(2 * least, share="fixed")
    with pytest.raises(BudgetError, match="'none' needs a budget"):
        engine.open("none")
    with pytest.raises(BudgetError, match="'large'"):
        engine.open("large", budget=2 * least + 1)
    for name in ("one", "two"):
        engine.open(name, budget=least).feed(moving(4))
    engine["one"].ask(QUESTION, max_new_tokens=1)
    engine.open("three", budget=least)
    assert held(engine) == {"one": least, "three": least, "two": 0}
    engine["two"].ask(QUESTION, max_new_tokens=1)
    assert held(engine) == {"one": 0, "three": least, "two": least}
    assert engine.usage.free_bytes == 0
    assert engine.usage.hibernated == 1


def test_a_session_is_resized_and_forked_within_the_whole(made: Made, least: int) -> None:
    engine = made(4 * least)
    one, _ = engine.open("one"), engine.open("two", least=2 * least)
    one.feed(moving(12))
    with pytest.raises(BudgetError):
        one.resize(10 * least)
    with pytest.raises(BudgetError):
        one.resize(least // 2)
    assert held(engine) == {"one": 2 * least, "two": 2 * least}
    one.resize(least)
    assert held(engine)["one"] == one.usage.budget_bytes == least
    other = one.fork("other")
    assert other.status.bytes == least
    assert other.ask(QUESTION, max_new_tokens=4).token_ids == one.ask(QUESTION, max_new_tokens=4).token_ids
    other.feed(moving(4, start=60.0))
    assert (one.usage.frames_seen, other.usage.frames_seen) == (12, 16)
    with pytest.raises(MillpondError, match="a session 'other' already"):
        one.fork("other")


def test_arguments_that_cannot_be_are_refused_in_one_line(family: Family, made: Made, least: int) -> None:
    for bad, said in (
        ({"stream_memory": "1MiB", "share": "some"}, "share must be one of equal, weight, fixed, not 'some'"),
        ({"stream_memory": "1MiB", "device_memory": "1GiB"}, "one of the two"),
        ({}, "one of the two"),
        ({"device_memory": "1GiB"}, "a model that the engine loads"),
        ({"stream_memory": "1MiB", "queue_memory": "1MiB"}, "leaves nothing"),
        ({"stream_memory": "1MiB", "forward_tokens": 0}, "forward_tokens must be a whole number from 1 on"),
    ):
        with pytest.raises(MillpondError, match=said):
            Engine(family, **bad)
    engine = made(4 * least)
    engine.open("one")
    with pytest.raises(MillpondError, match="a session 'one' already"):
        engine.open("one")
    with pytest.raises(MillpondError, match="a weight must be above 0"):
        engine.open("two", weight=0)
    with pytest.raises(BudgetError, match="has no cap"):
        engine.open("two", policy="full")
    with pytest.raises(BudgetError, match="at least and"):
        engine.open("two", budget=least, least=2 * least)
    with pytest.raises(MillpondError, match="no session 'two'"):
        engine["two"]


def test_one_number_for_the_device_leaves_the_streams_what_weights_and_a_pass_do_not_take() -> None:
    with Engine("minnow", device_memory="40MiB", forward_tokens=256) as engine:
        weights = sum(weight.nbytes for weight in engine.family.model.parameters())
        assert 0 < engine.usage.total_bytes < (40 << 20) - weights
        engine.open("one").feed([Frame(0.0, np.zeros((64, 64, 3), np.uint8))])
    with pytest.raises(BudgetError, match="too few for this model and stream"):
        Engine("minnow", device_memory="4MiB")


# --- hibernation --------------------------------------------------------------------------------------------------


def test_a_session_that_was_hibernated_answers_as_one_that_was_not(family: Family, made: Made, least: int) -> None:
    engine = made(least, share="fixed")
    sessions = [engine.open(str(index), budget=least) for index in range(4)]
    plain = [Session(family, budget=least) for _ in sessions]
    for turn in range(3):
        for index, (session, alone) in enumerate(zip(sessions, plain, strict=True)):
            frames = list(moving(7, seed=index, start=20.0 * turn))
            assert session.feed(frames) == alone.feed(frames) == 7
            answers = [one.ask(QUESTION, max_new_tokens=6, remember=turn == 1) for one in (session, alone)]
            assert answers[0].token_ids == answers[1].token_ids
    assert min(session.status.hibernations for session in sessions) >= 2
    for session, alone in zip(sessions, plain, strict=True):
        for kept, expected in zip(session.memory(), alone.memory(), strict=True):
            np.testing.assert_array_equal(kept.seconds, expected.seconds)
            np.testing.assert_array_equal(kept.row, expected.row)


def test_where_a_file_cannot_be_written_the_session_stays_and_the_newcomer_hears_why(
    made: Made, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(least, share="fixed", patience=0.05)
    one = engine.open("one", budget=least)
    one.feed(moving(4))

    def full(session: Session, path: Path) -> None:
        raise SnapshotError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Session, "save", full)
        with pytest.raises(BudgetError, match="the disk is full"):
            engine.open("two", budget=least)
        with pytest.raises(SnapshotError, match="the disk is full"):
            one.hibernate()
    assert one.status.in_memory
    assert one.ask(QUESTION, max_new_tokens=1).usage.frames_seen == 4
    engine.open("two", budget=least)


def test_a_damaged_file_is_its_own_sessions_trouble_alone(made: Made, least: int, tmp_path: Path) -> None:
    engine = made(2 * least, share="fixed")
    one, two = (engine.open(name, budget=least) for name in ("one", "two"))
    one.feed(moving(4))
    one.hibernate()
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    for _ in range(2):
        with pytest.raises(SnapshotError):
            one.ask(QUESTION)
    assert held(engine) == {"one": 0, "two": least}
    assert two.feed(moving(4)) == 4
    one.close()
    engine.open("one", budget=least).feed(moving(4))


# --- frames and faults --------------------------------------------------------------------------------------------


def test_offered_frames_come_in_order_and_the_oldest_go_when_too_many_wait(made: Made, least: int) -> None:
    engine = made(2 * least, queue_frames=3)
    one = engine.open("one")
    frames, gate, begun = list(moving(9)), threading.Event(), threading.Event()

    def slow() -> Iterator[Frame]:
        begun.set()
        assert gate.wait(10)
        yield from ()

    with one._turn():  # nothing of this session goes on meanwhile
        assert [one.offer(frame) for frame in frames[:5]] == [True, True, True, False, False]
        assert not one.offer(frames[5], wait=0.01)
        status = one.status
        assert (status.frames_waiting, status.frames_dropped) == (3, 3)
        assert engine.usage.held_bytes == 3 * frames[0].pixels.nbytes
        pending = threading.Thread(target=one.offer, args=(frames[6],), kwargs={"wait": 10.0})
        pending.start()
    pending.join()
    assert one.ask(QUESTION, max_new_tokens=1).at_seconds == frames[6].seconds
    assert one.usage.frames_seen == 4
    assert (one.status.frames_waiting, engine.usage.held_bytes > 0) == (0, True)


def test_an_offered_frame_is_a_copy_and_must_be_one_that_fits(made: Made, least: int) -> None:
    engine = made(2 * least, queue_memory=10_000)
    one, other = engine.open("one"), engine.open("other")
    frame = next(moving(1))
    with one._turn():
        assert one.offer(frame)
        frame.pixels[:] = 0
        assert one._queue.frames[0].frame.pixels.any()
        assert not other.offer(next(moving(1)))  # all that may wait is held by "one"
    assert other.status.frames_dropped == 1
    with pytest.raises(BudgetError, match="larger than the engine's queue_memory"):
        one.offer(Frame(9.0, np.zeros((100, 100, 3), np.uint8)))
    with pytest.raises(SourceError, match="offer a"):
        one.offer((1.0, frame.pixels))  # type: ignore[arg-type]
    one.close()
    with pytest.raises(MillpondError, match="closed"):
        one.offer(frame)


class Raising(KeyDiff):
    """A policy whose choice fails."""

    def score(self, view: Any) -> Any:
        raise RuntimeError("no choice")


def test_a_policy_that_raises_and_a_source_that_breaks_or_hangs_harm_nobody(made: Made, least: int) -> None:
    engine = made(8 * least)
    bad, good = engine.open("bad", policy=Raising(), budget=least), engine.open("good", budget=least)
    hanging, gate = engine.open("hanging", budget=least), threading.Event()

    def hang() -> Iterator[Frame]:
        yield from moving(3)
        assert gate.wait(10)

    feeding = threading.Thread(target=hanging.feed, args=(hang(),))
    feeding.start()

    def broken() -> Iterator[Frame]:
        yield from moving(3)
        raise SourceError("the cable is out")

    with pytest.raises(Exception, match="no choice"):
        bad.feed(moving(200))
    for frame in moving(6, start=500.0):
        bad.offer(frame, wait=10.0)
    assert bad.ask(QUESTION, max_new_tokens=1).text is not None
    assert bad.status.faults > 0
    assert "no choice" in bad.status.last_fault
    with pytest.raises(SourceError, match="the cable is out"):
        good.feed(broken())
    assert good.feed(moving(100, start=10.0)) == 100
    assert good.usage.compactions > 0
    assert hanging.ask(QUESTION, max_new_tokens=2).usage.frames_seen == 3
    gate.set()
    feeding.join()


def test_a_session_that_cannot_be_shrunk_for_its_policys_sake_makes_room_otherwise(made: Made, least: int) -> None:
    engine = made(4 * least)
    bad = engine.open("bad", policy=Raising())
    bad.feed(moving(40))
    assert bad.usage.compactions == 0
    engine.open("new", least=least)
    assert held(engine) == {"bad": 0, "new": 4 * least}
    assert bad.ask(QUESTION, max_new_tokens=1).usage.frames_seen == 40


# --- answers ------------------------------------------------------------------------------------------------------


def test_a_question_sees_what_was_given_before_it_and_frames_go_on(family: Family, made: Made, least: int) -> None:
    engine = made(4 * least)
    one = engine.open("one", budget=2 * least)
    alone = Session(family, budget=2 * least)
    frames = list(moving(12))
    for frame in frames[:4]:
        one.offer(frame, wait=10.0)
        alone.feed(frame)
    pending = one.begin(QUESTION, max_new_tokens=12)
    for frame in frames[4:]:
        one.offer(frame, wait=10.0)
    answer = pending.result(60)
    assert answer.at_seconds == frames[3].seconds
    assert "".join(pending) == answer.text
    assert answer.token_ids == alone.ask(QUESTION, max_new_tokens=12).token_ids
    assert one.ask(QUESTION, max_new_tokens=1).at_seconds == frames[-1].seconds
    assert one.status.frames_dropped == 0


def test_answers_are_cancelled_or_too_late_and_leave_nothing(
    made: Made, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(4 * least)
    one = engine.open("one", budget=2 * least)
    one.feed(moving(8))
    before = one.usage.live_bytes
    with one._turn():
        waits = one.begin(QUESTION)
        waits.cancel()
        late = one.begin(QUESTION, timeout=0.01)
        with pytest.raises(MillpondError, match=r"the answer took longer than 0.01 s"):
            late.result(60)
    with pytest.raises(MillpondError, match="cancelled"):
        waits.result(60)
    with pytest.raises(MillpondError, match=r"the answer took longer than 0 s"):
        one.ask(QUESTION, timeout=0)
    clock = iter([*range(6), *[100] * 20])
    with monkeypatch.context() as patched:
        patched.setattr("millpond.engine.handle.monotonic", lambda: next(clock))
        with pytest.raises(MillpondError, match=r"the answer took longer than 50 s"):
            one.ask(QUESTION, timeout=50)
    assert next(clock) == 100  # it had begun
    forgotten = one.begin(QUESTION)
    del forgotten
    with pytest.raises(MillpondError, match="the question is empty"):
        one.begin(" ").result(60)
    assert one.ask(QUESTION, max_new_tokens=2).text is not None
    assert one.usage.live_bytes == before


# --- the end ------------------------------------------------------------------------------------------------------


def test_closing_ends_what_has_begun_first_and_says_so_to_what_has_not(made: Made, least: int) -> None:
    engine = made(4 * least)
    one = engine.open("one")
    one.feed(moving(8))
    running = one.begin(QUESTION, max_new_tokens=20)
    engine.close()
    assert running.result(60).token_ids
    engine.close()
    for call in (lambda: one.ask(QUESTION), lambda: one.feed(moving(2)), lambda: engine.open("two"), lambda: one.usage):
        with pytest.raises(MillpondError, match="closed"):
            call()


def test_a_session_keeps_its_engine_and_an_engine_that_is_forgotten_ends(family: Family, least: int) -> None:
    before = set(threading.enumerate())
    session: EngineSession | None = Engine(family, stream_memory=4 * least, frame_size=SIZE).open("one")
    assert session is not None
    gc.collect()
    session.offer(next(moving(1)))
    assert session.ask(QUESTION, max_new_tokens=1).usage.frames_seen == 1
    session = None
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_standing_questions_go_on_when_the_session_has_been_hibernated(made: Made, family: Family, least: int) -> None:
    engine = made(3 * least, share="fixed")
    session, alone = engine.open("one", budget=2 * least), Session(family, budget=2 * least)
    asked = [each.every(2, QUESTION, max_new_tokens=3) for each in (session, alone)]
    pictures = list(moving(40))
    for part in (pictures[:15], pictures[15:]):
        session.feed(part)
        alone.feed(part)
        session.hibernate()
        assert not session.status.in_memory
    told = [[(event.at_seconds, event.text) for event in each.events(0)] for each in asked]
    assert told[0] == told[1]
    assert len(told[0]) == asked[0].counts.answered > 4
