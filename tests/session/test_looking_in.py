"""Reading a session from other threads and from within its own loops; and what a turn holds beside the books."""

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from millpond import ModelError, Session
from millpond.cache.pond import Mark, Pond
from millpond.frames import Frame
from millpond.models.base import Family
from millpond.stream.step import Step
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes

QUESTION = "which one"


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny("qwen2_5_vl")


def both(*work: object) -> list[BaseException]:
    """Run at once; return what was raised."""
    raised: list[BaseException] = []

    def guarded(run: object) -> None:
        try:
            run()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def test_first_looks_from_many_threads_make_one_memory(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = Pond.__init__

    def slow(pond: Pond, *args: object) -> None:
        made.append(pond)
        time.sleep(0.05)
        init(pond, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Pond, "__init__", slow)
    session = Session(family, budget="1MiB")
    frames = list(moving(4))
    assert both(lambda: session.usage, lambda: session.feed(frames), session.memory, lambda: session.usage) == []
    assert len(made) == 1
    assert session.usage.frames_seen == 4


def test_looks_during_a_feed_see_whole_blocks(family: Family) -> None:
    session = Session(family, budget="300KiB", policy="mikv:group=8:full_share=0.4")
    done = threading.Event()

    def feed() -> None:
        try:
            session.feed(list(moving(40)))
        finally:
            done.set()

    def look() -> None:
        while not done.is_set():
            lengths = {layer.seconds.shape[1] for layer in session.memory()}
            assert len(lengths) == 1
            usage = session.usage
            assert usage.allocated_bytes <= usage.peak_bytes <= session.plan.budget

    assert both(feed, look) == []
    assert session.usage.compactions > 0


def test_ones_own_streaming_loop_may_look_and_keeps_its_gradients(family: Family) -> None:
    session = Session(family, budget="1MiB")
    session.feed(list(moving(9)))
    before, remembered = session.usage, session.memory()
    for remember in (False, True):
        pieces = session._answer(QUESTION, 3, remember, lambda: None, lambda: None)
        next(pieces)
        assert torch.is_grad_enabled()
        during = session.usage
        assert during.live_bytes > before.live_bytes
        # What is not remembered is no part of the memory, not for an instant.
        assert (during.memory_tokens > before.memory_tokens) == remember
        assert (session.memory()[0].seconds.shape > remembered[0].seconds.shape) == remember
        assert session.plan.budget == 1 << 20
        assert len(list(pieces)) > 0
    for _ in session.stream(QUESTION, max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert session.usage.budget_bytes == 1 << 20
        assert session.ask(QUESTION, max_new_tokens=2).text


def test_a_question_does_not_wait_for_a_source_that_gives_nothing(family: Family) -> None:
    session = Session(family, budget="1MiB")
    asked = threading.Event()

    def source() -> Iterator[Frame]:
        yield from moving(4)
        assert asked.wait(60)  # a camera in the dark
        yield from moving(2, start=9)

    def ask() -> None:
        while session.usage.frames_seen < 4:
            time.sleep(0.01)
        assert session.ask(QUESTION, max_new_tokens=1).at_seconds == 1.5
        asked.set()

    assert both(lambda: session.feed(source()), ask) == []
    assert session.usage.frames_seen == 6


def storages() -> dict[int, int]:
    """Every tensor that is alive anywhere, by storage."""
    found = {}
    for thing in gc.get_objects():
        # Other tests' tracers leave tensors behind that only stand for some.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "remember"), nightly([("infinipot-v", False), ("streammem", True)], but=[("streammem", True)])
)
def test_between_two_pieces_nothing_is_held_that_is_not_counted(policy: str, remember: bool) -> None:
    family = tiny("qwen2_5_vl", seed=1)
    family.stop_ids = frozenset()
    session = Session(family, budget="1MiB", policy=policy)
    session.feed(list(moving(9)))  # an odd frame waits, whose features the question is shown
    session.ask(QUESTION, max_new_tokens=2)
    before = storages()
    undo, ledger = [], session._runner.pond.ledger
    for _ in session._answer(QUESTION, 20, remember, lambda: None, lambda: None):
        new = sum(size for at, size in storages().items() if at not in before)
        assert new <= ledger.account("undo") <= session.plan.undo_bytes
        undo.append(new)
    assert len(undo) > 1
    assert max(undo) == (session.plan.query_bytes if remember else 0)


@pytest.mark.parametrize("policy", ["h2o", "mikv:group=8:full_share=0.4:base=h2o"])
def test_what_a_block_could_have_to_put_back_is_counted(
    family: Family, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(family, budget="400KiB", policy=policy)
    commit, mark, copies = Step.commit, Pond.mark, []
    marks: list[Mark] = []

    def marked(pond: Pond, **which: bool) -> Mark:
        marks[:] = [mark(pond, **which)]
        return marks[0]

    def measured(step: Step) -> None:
        ledger = session._runner.pond.ledger
        copies.append(sum(copy.nbytes for copy in marks[0].accumulated_attention))
        assert copies[-1] <= ledger.account("undo") == session.plan.undo_bytes
        assert held_bytes(session) <= ledger.held <= session.plan.budget
        commit(step)

    monkeypatch.setattr(Step, "commit", measured)
    monkeypatch.setattr(Pond, "mark", marked)
    session.feed(list(moving(80)))
    assert session.usage.compactions > 0
    assert max(copies) > session.plan.undo_bytes / 2
    assert session._runner.pond.ledger.account("undo") == 0


def test_the_peak_is_never_above_the_budget_also_after_a_smaller_one(family: Family) -> None:
    session = Session(family, budget="1MiB")
    session.feed(list(moving(30)))
    assert session.usage.peak_bytes > 400 << 10
    session.resize("400KiB")
    assert session.usage.allocated_bytes <= session.usage.peak_bytes <= 400 << 10
    session.feed(list(moving(30, start=20)))
    assert session.usage.allocated_bytes < session.usage.peak_bytes <= 400 << 10


def test_a_session_begun_in_inference_mode_goes_on_outside_of_it(family: Family) -> None:
    frames = list(moving(40))
    with torch.inference_mode():
        session = Session(family, budget="300KiB")
        session.feed(frames[:11])
    session.feed(frames[11:])
    whole = Session(family, budget="300KiB")
    whole.feed(frames)
    assert session.ask(QUESTION, max_new_tokens=3).token_ids == whole.ask(QUESTION, max_new_tokens=3).token_ids


def test_a_model_that_was_cast_after_the_start_is_one_clear_line() -> None:
    family = tiny("qwen2_5_vl")
    session = Session(family, budget="300KiB")
    session.feed(list(moving(9)))
    family.model.half()
    for use in (lambda: session.feed(list(moving(2, start=30))), lambda: session.ask(QUESTION)):
        with pytest.raises(ModelError, match=r"was torch.float32 when it was adapted and is torch.float16 now"):
            use()
    family.model.float()
    session.feed(list(moving(2, start=30)))
    assert session.usage.frames_seen == 11
