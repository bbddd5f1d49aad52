"""Who runs when on the model's thread; what one request does to others."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from millpond import MillpondError
from millpond.engine import scheduler as scheduling
from millpond.engine.scheduler import Scheduler
from millpond.models.batching import Request


class Model:
    """In place of a family and its batches: notes what ran together, and waits where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[str]] = []
        self.gate, self.inside = threading.Event(), threading.Event()
        self.gate.set()
        self.fails: set[str] = set()
        monkeypatch.setattr(scheduling, "forward_batch", self.run)
        monkeypatch.setattr(scheduling, "logits_batch", lambda family, hidden: [one * 2 for one in hidden])

    def run(self, family: Any, requests: list[Request]) -> list[Tensor]:
        names = [request.cache.name for request in requests]
        self.passes.append(names)
        self.inside.set()
        assert self.gate.wait(10)
        if self.fails & set(names):
            raise RuntimeError(f"no memory for {len(names)}")
        return [torch.full((1, 4), float(len(names))) for _ in names]


class Cache:
    length = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.truncated = 0

    def truncate(self, length: int) -> None:
        self.truncated += 1


def request(name: str, see: Any = None, tokens: int = 1) -> Request:
    return Request([0] * tokens, torch.zeros(1, tokens), Cache(name), see)  # type: ignore[arg-type]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model, most_tokens=64)  # type: ignore[arg-type]
    yield made
    model.gate.set()
    made.close()


def started(*runs: Callable[[], Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    return threads


def held(model: Model, scheduler: Scheduler) -> threading.Thread:
    """Something runs, and goes on doing so until the gate opens."""
    model.gate.clear()
    (thread,) = started(lambda: scheduler.forward(request("first")))
    assert model.inside.wait(5)
    return thread


def queued(scheduler: Scheduler, count: int) -> None:
    while len(scheduler._waiting) < count:
        pass


def test_what_waits_runs_together_as_far_as_it_fits(model: Model, scheduler: Scheduler) -> None:
    threads = [held(model, scheduler)]
    threads += started(*(lambda name=name: scheduler.forward(request(name, tokens=30)) for name in "abc"))
    queued(scheduler, 3)
    model.gate.set()
    for thread in threads:
        thread.join()
    assert [len(names) for names in model.passes] == [1, 2, 1]
    assert (scheduler.passes, scheduler.requests) == (3, 4)


def test_questions_go_first_and_frames_after_two_of_their_passes(model: Model, scheduler: Scheduler) -> None:
    def asks(count: int) -> None:
        with scheduler.asking():
            for _ in range(count):
                scheduler.forward(request("question"))

    threads = [held(model, scheduler)]
    threads += started(lambda: scheduler.forward(request("frames")), lambda: asks(4))
    queued(scheduler, 2)
    model.gate.set()
    for thread in threads:
        thread.join()
    order = [sorted(names) for names in model.passes]
    assert order == [["first"], ["question"], ["question"], ["frames", "question"], ["question"]]


def test_the_last_token_of_a_question_is_scored_in_its_pass(model: Model, scheduler: Scheduler) -> None:
    with scheduler.asking():
        hidden = scheduler.forward(request("question"))
        assert torch.equal(scheduler.logits(hidden[-1]), torch.full((4,), 2.0))
        assert scheduler.requests == 1
        assert torch.equal(scheduler.logits(torch.ones(4)), torch.full((4,), 2.0))
        assert scheduler.requests == 2  # of another hidden state nothing was known


def test_a_pass_that_fails_is_run_again_one_by_one(model: Model, scheduler: Scheduler) -> None:
    model.fails = {"bad"}
    outcomes: dict[str, Any] = {}
    requests = {"good": request("good"), "bad": request("bad"), "seen": request("seen", see=lambda *_: None)}

    def run(name: str) -> None:
        try:
            outcomes[name] = float(scheduler.forward(requests[name])[0, 0])
        except RuntimeError as error:
            outcomes[name] = str(error)

    threads = [held(model, scheduler), *started(*(lambda name=name: run(name) for name in requests))]
    queued(scheduler, 3)
    model.gate.set()
    for thread in threads:
        thread.join()
    # What was shown of the queries of "seen" cannot be taken back here, so it hears of the fault.
    assert outcomes == {"good": 1.0, "bad": "no memory for 1", "seen": "no memory for 3"}
    assert requests["good"].cache.truncated == 1


def test_an_interrupt_waits_for_the_pass_that_writes_to_its_memory(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wanted: object) -> None:
        assert model.inside.wait(5)
        threading.Timer(0.05, model.gate.set).start()
        raise KeyboardInterrupt

    model.gate.clear()
    monkeypatch.setattr(scheduling._Wanted, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.forward(request("mine"))
    assert model.gate.is_set()  # it did not come back before the pass had ended


def test_whoever_waits_when_it_is_closed_is_told(model: Model, scheduler: Scheduler) -> None:
    said: list[str] = []

    def run() -> None:
        try:
            scheduler.forward(request("late"))
        except MillpondError as error:
            said.append(str(error))

    threads = [held(model, scheduler), *started(run)]
    queued(scheduler, 1)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._closed:
        pass
    model.gate.set()
    for thread in (*threads, closing):
        thread.join()
    assert said == ["the engine was closed meanwhile"]
    with pytest.raises(MillpondError, match="the engine is closed"):
        scheduler.forward(request("later"))
