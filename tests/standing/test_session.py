"""`Session.every`: what is asked when, that it equals `ask`, and that the stream goes on as if nothing had been asked."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from millpond import Answer, MillpondError, Session
from millpond.eval import streams
from millpond.frames import Frame, SourceInfo
from millpond.models.base import Family
from millpond.standing import StandingEvent
from tests.models.tiny import tiny
from tests.session.frames import moving

NOW = "Which object is there now?"
QUESTION = "what is there now"


@pytest.fixture(scope="module")
def minnow() -> Family:
    return Session.from_pretrained("minnow", budget="1MiB", device="cpu").family


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")


def state(session: Session) -> list[bytes]:
    """The memory, bit for bit."""
    pond = session._runner.pond
    live = [tensor[:, : pond.length] for layer in pond.layers for tensor in layer.tensors()]
    return [repr((session._runner.clock, pond.length)).encode(), *(each.numpy().tobytes() for each in live)]


def asking(
    session: Session, frames: list[Frame], when: set[float], *questions: str
) -> tuple[Iterator[Frame], list[Answer]]:
    """The frames, and the answers to `ask` when those at `when` have been taken in."""
    answers: list[Answer] = []

    def given() -> Iterator[Frame]:
        for frame in frames:
            yield frame
            if frame.seconds in when:
                answers.extend(session.ask(question, max_new_tokens=4) for question in questions)

    return given(), answers


def test_a_change_is_told_when_it_comes(minnow: Family) -> None:
    """The stream's events say what is there at every second; the answers follow them."""
    stream = streams.generate(7, groups=40, level="plain")
    session = Session(minnow, budget="1MiB")
    standing = session.every(2, NOW, max_new_tokens=8)
    session.feed(stream.frames())
    events = list(standing.events(timeout=0))
    assert [event.at_seconds for event in events] == [2.0 * number for number in range(1, 20)]
    assert [event.due_seconds for event in events] == [event.at_seconds for event in events]
    shown = {
        event.at_seconds: {each.name for each in stream.events if each.sight(int(event.at_seconds)) is not None}
        for event in events
    }
    assert all(event.text in (shown[event.at_seconds] or {"nothing"}) for event in events)
    texts = [event.text for event in events]
    before = [None, *texts[:-1]]
    assert [event.previous for event in events] == before
    assert [event.kind for event in events] == [
        "same" if text == last else "changed" for text, last in zip(texts, before, strict=True)
    ]
    assert standing.latest is events[-1]
    assert standing.counts == events[-1].counts
    assert standing.counts.answered == 19
    assert 4 < standing.counts.changed == sum(event.kind == "changed" for event in events) < 19


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "512KiB"},  # blocks of eight frames: most questions find frames that wait
        {"budget": "512KiB", "recent_frames": 3},
        {"policy": "full"},
        {"budget": "512KiB", "policy": "rekv", "host_budget": "1MiB"},
    ],
)
def test_answers_are_those_of_ask_and_the_stream_is_that_of_nobody_asking(
    qwen: Family, options: dict[str, Any]
) -> None:
    frames = list(moving(41))
    session, twin, alone = (Session(qwen, **options) for _ in range(3))
    first, second = (session.every(1.5, text, max_new_tokens=4) for text in (QUESTION, "and before"))
    session.feed(frames)
    given, answers = asking(twin, frames, {event.at_seconds for event in first.events(0)}, QUESTION, "and before")
    assert len(list(second.events(0))) == 13  # read above: those of the first are gone
    twin.feed(given)
    alone.feed(frames)
    assert state(session) == state(twin) == state(alone)
    assert session.usage.peak_bytes <= (session.usage.budget_bytes or session.usage.peak_bytes)
    assert len(answers) == 26
    for standing, expected in ((first, answers[-2]), (second, answers[-1])):
        event = standing.latest
        assert event is not None
        assert event.answer is not None
        assert event.answer.token_ids == expected.token_ids
        assert event.answer.usage.live_bytes == expected.usage.live_bytes
        assert event.at_seconds == event.answer.at_seconds == expected.at_seconds == 19.5


def test_questions_at_one_instant_share_the_run_of_the_frames_they_are_shown(
    qwen: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = type(qwen).encode
    monkeypatch.setattr(type(qwen), "encode", lambda self, *given: encoded.append(given) or encode(self, *given))

    def blocks(session: Session, source: Any) -> int:
        encoded.clear()
        session.feed(source)
        return len(encoded)

    frames, texts = list(moving(13)), (QUESTION, "and before", "how many")
    alone, twin, session = (Session(qwen, budget="1MiB", recent_frames=4) for _ in range(3))
    same = [session.every(3, QUESTION, max_new_tokens=4) for _ in range(2)]
    others = [session.every(seconds, text, max_new_tokens=4) for seconds, text in ((6, "and before"), (3, "how many"))]
    given, answers = asking(twin, frames, {3.0, 6.0}, *texts)
    unasked = blocks(alone, frames)
    assert blocks(twin, given) == unasked + 6
    assert blocks(session, frames) == unasked + 2
    for standing, answer in zip((*same, *others), (answers[3], *answers[3:]), strict=True):
        assert standing.latest is not None
        assert standing.latest.text == answer.text
    assert [each.counts.reused for each in (*same, *others)] == [0, 2, 0, 0]
    assert [each.counts.answered for each in (*same, *others)] == [2, 2, 1, 2]


def test_due_times_do_not_drift_and_a_jump_asks_once(qwen: Family) -> None:
    session, black = Session(qwen, budget="1MiB"), np.zeros((56, 56, 3), np.uint8)
    standing = session.every(1, QUESTION, max_new_tokens=1)
    session.feed([Frame(1e6 + 0.3 * index, black) for index in range(11)])  # 0.3 s divide no second
    session.feed([Frame(0.5 * index, black) for index in range(3)])  # begins again: the stream goes on at 3.3 s
    session.feed([Frame(1e6 + 6 * 3600 + 0.2 + index, black) for index in range(2)])
    events = list(standing.events(0))
    assert [round(event.at_seconds - 1e6, 1) for event in events] == [1.2, 2.1, 3.0, 4.3, 21600.2, 21601.2]
    assert [event.due_seconds - 1e6 for event in events] == [1, 2, 3, 4, 21600, 21601]
    assert [event.missed for event in events] == [0, 0, 0, 0, 21595, 0]
    assert (standing.counts.answered, standing.counts.late, standing.counts.missed) == (6, 1, 21595)


def test_a_question_set_up_in_mid_stream_is_due_with_the_others(qwen: Family) -> None:
    session = Session(qwen, budget="1MiB")
    first = session.every(2, QUESTION, max_new_tokens=1)
    session.feed(moving(8))  # to 3.5 s
    second, rare = session.every(2, "and before", max_new_tokens=1), session.every(1e11, QUESTION)
    session.feed(moving(4, start=4.0))
    assert [event.at_seconds for event in second.events(0)] == [4.0]
    assert [event.at_seconds for event in first.events(0)] == [2.0, 4.0]
    assert rare.latest is None
    late = Session(qwen, budget="1MiB")
    late.feed(moving(3))
    counted = late.every(2, QUESTION, max_new_tokens=1)  # nobody has counted from the first frame
    late.feed(moving(5, start=1.5))
    assert [event.at_seconds for event in counted.events(0)] == [3.0]


def test_what_cannot_be_answered_is_told_and_asked_again(qwen: Family) -> None:
    frames = list(moving(13))
    session, alone = Session(qwen, budget="256KiB"), Session(qwen, budget="256KiB")
    long = session.every(2, "word " * 200, max_new_tokens=1)
    short = session.every(2, QUESTION, max_new_tokens=1)
    assert session.feed(frames) == 13
    alone.feed(frames)
    assert (long.counts.failed, long.counts.answered) == (3, 0)
    assert (short.counts.failed, short.counts.answered) == (0, 3)
    event = long.latest
    assert event is not None
    assert event.kind == "failed"
    assert event.text is None
    assert "does not fit" in event.to_dict()["error"]
    assert state(session) == state(alone)


def test_a_fault_of_the_model_fails_all_that_were_due(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = list(moving(13))
    session, alone = Session(qwen, budget="256KiB"), Session(qwen, budget="256KiB")
    questions = [session.every(2, text, max_new_tokens=2) for text in (QUESTION, "and before")]
    logits, calls = type(qwen).logits, []

    def failing(self: Family, hidden: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return logits(self, hidden)

    monkeypatch.setattr(type(qwen), "logits", failing)
    session.feed(frames)
    alone.feed(frames)
    assert [each.counts.failed for each in questions] == [0, 1]
    assert [each.counts.answered for each in questions] == [3, 2]
    assert state(session) == state(alone)


def test_a_callback_may_raise_ask_set_up_and_cancel(qwen: Family) -> None:
    session, seen = Session(qwen, budget="1MiB"), []

    def ending(event: StandingEvent) -> None:
        seen.append(session.ask("and now", max_new_tokens=1).at_seconds)
        if len(seen) == 2:
            once.cancel()
            session.every(1, "how many", max_new_tokens=1, on_answer=lambda event: seen.append(event.question))

    def raising(event: StandingEvent) -> None:
        session.feed(Frame(100.0, np.zeros((56, 56, 3), np.uint8)))  # refused: a feed is running

    once = session.every(1, QUESTION, max_new_tokens=1, on_answer=ending)
    bad = session.every(1, QUESTION, max_new_tokens=1, on_answer=raising)
    with pytest.warns(RuntimeWarning, match="raised MillpondError: frames are being fed") as warned:
        session.feed(moving(9))
    assert len(warned) == 1
    assert seen == [1.0, 2.0, "how many", "how many"]
    assert once.counts.answered == 2
    assert (bad.counts.answered, bad.counts.callbacks_failed) == (4, 4)
    assert list(once.events())[-1] is once.latest  # ends, because it is cancelled


def test_an_interrupt_within_a_callback_ends_the_feed_and_loses_nothing(qwen: Family) -> None:
    session, frames = Session(qwen, budget="256KiB"), list(moving(13))

    def interrupted(event: StandingEvent) -> None:
        standing.cancel()
        raise KeyboardInterrupt

    standing = session.every(2, QUESTION, max_new_tokens=1, on_answer=interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.feed(frames)
    assert session.usage.frames_seen == 5
    session.feed(frames[5:])
    assert session.usage.frames_seen == 13


def test_another_thread_sets_up_reads_and_cancels_during_a_feed(qwen: Family) -> None:
    session, taken, going = Session(qwen, budget="1MiB"), threading.Event(), threading.Event()
    read: list[StandingEvent] = []

    def endless() -> Iterator[Frame]:
        for frame in moving(100):
            if frame.seconds == 2.0:
                taken.set()
                going.wait(30)
            if standing and standing[0].cancelled:
                return
            yield frame

    def reading() -> None:
        taken.wait(30)
        standing.append(session.every(1, QUESTION, max_new_tokens=1))
        going.set()
        for event in standing[0].events(timeout=30):
            read.append(event)
            if len(read) == 3:
                standing[0].cancel()
                return

    standing: list[Any] = []
    reader = threading.Thread(target=reading)
    reader.start()
    session.feed(endless())
    reader.join(30)
    assert not reader.is_alive()
    assert [event.at_seconds for event in read] == [2.5, 3.5, 4.5]  # counted from the latest frame
    assert session.usage.frames_seen < 100


def test_a_fork_has_none_and_a_remembered_turn_is_seen(qwen: Family) -> None:
    session = Session(qwen, budget="1MiB")
    standing = session.every(2, QUESTION, max_new_tokens=4)
    session.feed(moving(4))
    session.ask("remember this", max_new_tokens=4, remember=True)
    other = session.fork()
    session.feed(moving(3, start=2.0))
    other.feed(moving(3, start=2.0))
    assert standing.counts.answered == 1
    twin = Session(qwen, budget="1MiB")
    twin.feed(moving(4))
    twin.ask("remember this", max_new_tokens=4, remember=True)
    twin.feed(moving(1, start=2.0))
    event = standing.latest
    assert event is not None
    assert event.answer is not None
    assert event.answer.token_ids == twin.ask(QUESTION, max_new_tokens=4).token_ids


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300, 10**400, 1e-9, True, "30", None])
def test_an_interval_that_is_none_is_refused(qwen: Family, seconds: Any) -> None:
    with pytest.raises(MillpondError, match="an interval is a number of seconds"):
        Session(qwen, budget="1MiB").every(seconds, QUESTION)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"question": " "}, "the question is empty"),
        ({"question": 3}, "a question is text"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"on_answer": 3}, "cannot be called"),
    ],
)
def test_what_could_never_be_asked_is_refused_at_once(qwen: Family, given: dict[str, Any], told: str) -> None:
    with pytest.raises(MillpondError, match=told):
        Session(qwen, budget="1MiB").every(30, **{"question": QUESTION, **given})


def test_frames_of_a_live_source_do_not_wait_for_an_answer(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that lasts for 4 s of the stream: asked about the instant at which it was due, and once."""
    session, twin, ended = Session(qwen, budget="1MiB"), Session(qwen, budget="1MiB"), threading.Event()
    begin = session.begin

    class Lasting:
        def __init__(self, *given: Any, **more: Any) -> None:
            self._answer = begin(*given, **more)

        @property
        def done(self) -> bool:
            return ended.is_set() and self._answer.wait(30)

        def result(self) -> Answer:
            return self._answer.result(30)

    class Live:
        info, dropped = SourceInfo(name="camera", kind="url", live=True), 0

        def __iter__(self) -> Iterator[Frame]:
            for frame in moving(13):
                if frame.seconds == 5.0:
                    ended.set()
                yield frame

    monkeypatch.setattr(session, "begin", Lasting)
    standing = session.every(1, QUESTION, max_new_tokens=4)
    session.feed(Live())
    events = list(standing.events(0))
    assert [event.due_seconds for event in events] == [1.0, 5.0, 6.0]
    assert standing.counts.overlapping == 3
    twin.feed(moving(3))
    assert events[0].answer is not None
    assert events[0].at_seconds == 1.0
    assert events[0].answer.token_ids == twin.ask(QUESTION, max_new_tokens=4).token_ids
