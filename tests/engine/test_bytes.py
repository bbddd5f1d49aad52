"""The engine's bytes are never passed, at any instant of random traffic: by the ledgers, and by the tensors that are alive."""

import contextlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from millpond import Engine, MillpondError, SessionConfig
from millpond.cache.pond import Pond
from millpond.device import minimum_budget
from millpond.engine.backlog import Queue
from millpond.memory.ledger import Ledger
from millpond.stream.ingest import Ingest
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.session.measure import held_bytes

FAMILY = tiny("qwen2_5_vl")
LEAST = minimum_budget(FAMILY, FAMILY.grid(56, 56), SessionConfig())
QUEUE = 100_000
NAMES = st.sampled_from("abcdef")


class Watch:
    """Everything alive that holds bytes of a stream, whoever still refers to it; and the most that it ever was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._alive: list[weakref.ref[Any]] = []
        self.by_ledgers = self.by_tensors = 0
        for kind in (Pond, Ingest, Queue):
            monkeypatch.setattr(kind, "__init__", self._noting(kind.__init__))
        hold = Ledger.hold

        def watched(ledger: Ledger, name: str, size: int) -> None:
            hold(ledger, name, size)
            self.look()

        monkeypatch.setattr(Ledger, "hold", watched)

    def _noting(self, init: Callable[..., None]) -> Callable[..., None]:
        def noted(thing: Any, *args: Any, **kwargs: Any) -> None:
            init(thing, *args, **kwargs)
            with self._lock:
                self._alive = [*(ref for ref in self._alive if ref() is not None), weakref.ref(thing)]

        return noted

    def _of(self, kind: type) -> list[Any]:
        with self._lock:
            return [thing for thing in (ref() for ref in self._alive) if isinstance(thing, kind)]

    def look(self) -> None:
        """By the ledgers, and what waits in queues."""
        ponds, queues = self._of(Pond), self._of(Queue)
        held = sum(pond.ledger.held + (pond.host.nbytes if pond.host else 0) for pond in ponds)
        waiting = sum(frame.bytes for queue in queues for frame in list(queue.frames))
        self.by_ledgers = max(self.by_ledgers, held + waiting)

    def walk(self) -> None:
        """By the tensors and arrays themselves."""
        ponds, ingests = self._of(Pond), self._of(Ingest)
        frames = [waiting.frame.pixels for queue in self._of(Queue) for waiting in list(queue.frames)]
        standing = [ingest.at for ingest in ingests]
        self.by_tensors = max(self.by_tensors, held_bytes(_Family(), ponds, standing, frames))  # type: ignore[arg-type]


class _Family:
    """What `held_bytes` leaves out: what all sessions share."""

    family = FAMILY


class Traffic(RuleBasedStateMachine):
    """Sessions come, go and are used, by several threads at once; forwards are looked at from inside."""

    watch: Watch
    fullest = 0.0  # share of the bytes that were held by tensors
    hibernations = 0

    @initialize(share=st.sampled_from(["equal", "weight", "fixed"]), room=st.integers(2, 5))
    def begin(self, share: str, room: int) -> None:
        self.folder = tempfile.mkdtemp()
        self.total = room * LEAST + LEAST // 2 + QUEUE
        self.watch.by_ledgers = self.watch.by_tensors = 0
        self.engine = Engine(
            FAMILY, stream_memory=self.total, queue_memory=QUEUE, share=share, patience=0.2, frame_size=(56, 56),
            state_dir=self.folder,
        )  # fmt: skip
        self.share = share
        self.clock = 0.0
        self.answers: list[Any] = []
        run = self.engine._shared.scheduler._serve

        def watched(batch: Any) -> Any:
            self.watch.walk()
            outcomes = run(batch)
            self.watch.walk()
            return outcomes

        self.engine._shared.scheduler._serve = watched  # type: ignore[method-assign]

    def pick(self, index: int) -> Any:
        sessions = self.engine.sessions
        return sessions[index % len(sessions)]

    def tried(self, run: Callable[[], Any]) -> Any:
        """What is refused by name is refused, and that is all."""
        result = None
        with contextlib.suppress(MillpondError):
            result = run()
        self.check()
        return result

    def check(self) -> None:
        self.watch.walk()
        assert self.watch.by_ledgers <= self.total
        assert self.watch.by_tensors <= self.total
        usage = self.engine.usage
        assert usage.held_bytes <= self.total
        granted = sum(session.status.bytes for session in self.engine)
        assert granted + usage.free_bytes <= self.total - QUEUE

    @rule(name=NAMES, times=st.floats(1, 3), least=st.none() | st.floats(0.5, 2), weight=st.floats(0.1, 5))
    def open(self, name: str, times: float, least: float | None, weight: float) -> None:
        budget = int(times * LEAST) if self.share == "fixed" or weight < 1 else None
        lowest = None if least is None else int(least * LEAST)
        self.tried(lambda: self.engine.open(name, budget=budget, weight=weight, least=lowest))

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), count=st.integers(1, 24))
    def feed(self, index: int, count: int) -> None:
        self.clock += 20.0
        self.tried(lambda: self.pick(index).feed(moving(count, start=self.clock)))

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), count=st.integers(1, 12))
    def offer(self, index: int, count: int) -> None:
        self.clock += 20.0
        session = self.pick(index)
        for frame in moving(count, start=self.clock):
            session.offer(frame)
        self.check()

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), tokens=st.integers(1, 8), remember=st.booleans())
    def ask(self, index: int, tokens: int, remember: bool) -> None:
        self.tried(lambda: self.pick(index).ask("what is there", max_new_tokens=tokens, remember=remember))

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), tokens=st.integers(1, 30))
    def ask_beside(self, index: int, tokens: int) -> None:
        self.answers.append(self.pick(index).begin("what was first", max_new_tokens=tokens))
        self.check()

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), times=st.floats(0.5, 4))
    def resize(self, index: int, times: float) -> None:
        self.tried(lambda: self.pick(index).resize(int(times * LEAST)))

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5), name=NAMES)
    def fork(self, index: int, name: str) -> None:
        self.tried(lambda: self.pick(index).fork(name))

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5))
    def hibernate(self, index: int) -> None:
        self.tried(self.pick(index).hibernate)

    @precondition(lambda self: self.engine.sessions)
    @rule(index=st.integers(0, 5))
    def close(self, index: int) -> None:
        self.tried(self.pick(index).close)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            Traffic.hibernations += sum(session.status.hibernations for session in self.engine)
            self.engine.close()
            self.check()
            Traffic.fullest = max(Traffic.fullest, self.watch.by_tensors / self.total)
            shutil.rmtree(self.folder)


@pytest.mark.parametrize(
    ("examples", "steps", "alike"),
    [pytest.param(12, 14, True, marks=pytest.mark.slow), pytest.param(150, 25, False, marks=pytest.mark.nightly)],
)
def test_the_bytes_are_never_passed(examples: int, steps: int, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Traffic.watch, Traffic.fullest, Traffic.hibernations = Watch(monkeypatch), 0.0, 0
    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=alike, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert Traffic.fullest > 0.5
    assert Traffic.hibernations > 0
