"""Many sessions with traffic at once: each is what it would have been alone."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from millpond import Engine, Session, SessionConfig
from millpond.device import minimum_budget
from millpond.engine import EngineSession
from millpond.models import Family
from tests.models.tiny import tiny
from tests.session.frames import moving

QUESTIONS = ("what is there now", "what was first", "where is it")
Call = Callable[[Any], Any]


def traffic(seed: int, calls: int, policy: str) -> list[Call]:
    """What is done with one session, the same for every kind of session."""
    chance, clock, made = random.Random(seed), 0.0, []
    for _ in range(calls):
        if chance.random() < 0.5:
            count, clock = chance.randrange(1, 17), clock + 20.0
            frames = list(moving(count, seed=seed, start=clock))
            made.append(lambda one, frames=frames: one.feed(frames))
        else:
            question, tokens = chance.choice(QUESTIONS), chance.randrange(1, 9)
            remember = chance.random() < 0.3 and policy != "rekv"
            made.append(
                lambda one, question=question, tokens=tokens, remember=remember: (
                    one.ask(question, max_new_tokens=tokens, remember=remember).token_ids
                )
            )
    return made


def at_once(runs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def memory_of(session: Any) -> list[np.ndarray]:
    return [part for layer in session.memory() for part in (layer.seconds, layer.row, layer.column)]


def check(family: Family, folder: Path, count: int, calls: int, room: int, together: int, policies: list[str]) -> None:
    """So many sessions, of which `room` have room in memory, against each alone."""
    budget = 2 * minimum_budget(family, family.grid(56, 56), SessionConfig())
    plans = [(policies[index % len(policies)], index) for index in range(count)]
    with Engine(
        family, stream_memory=room * budget + 1000, queue_memory=1000, share="fixed", state_dir=folder,
        forward_tokens=together, patience=300.0,
    ) as engine:  # fmt: skip
        given: list[list[Any]] = [[] for _ in plans]
        faults: list[BaseException] = []
        sessions: list[EngineSession] = [
            engine.open(str(index), budget=budget, policy=policy) for policy, index in plans
        ]

        def use(index: int) -> None:
            try:
                for call in traffic(index, calls, plans[index][0]):
                    given[index].append(call(sessions[index]))
            except BaseException as error:
                faults.append(error)

        at_once([lambda index=index: use(index) for index in range(count)])
        assert faults == []
        usage = engine.usage
        assert (usage.requests > 1.2 * usage.passes) == (together > 1)
        assert (usage.wakings > 0) == (room < count)
        for (policy, index), session in zip(plans, sessions, strict=True):
            alone = Session(family, budget=budget, policy=policy)
            assert given[index] == [call(alone) for call in traffic(index, calls, policy)]
            if together == 1:
                for mine, other in zip(memory_of(session), memory_of(alone), strict=True):
                    np.testing.assert_array_equal(mine, other)
                ours, theirs = session._resident.session, alone
                assert ours is not None
                for one, two in zip(ours._runner.pond.storage.layers, theirs._runner.pond.storage.layers, strict=True):
                    assert one.keys[:, :, : one.length].equal(two.keys[:, :, : two.length])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("together", [1, 2048])
def test_sessions_at_once_are_what_each_is_alone(together: int, tmp_path: Path) -> None:
    """Run one by one, bit for bit; in shared passes, with the same tokens."""
    check(tiny("qwen2_5_vl"), tmp_path, 4, 5, 3, together, ["infinipot-v", "h2o"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
def test_the_same_for_every_family(name: str, tmp_path: Path) -> None:
    check(tiny(name), tmp_path, 6, 6, 4, 2048, ["infinipot-v", "keydiff"])


@pytest.mark.nightly
def test_a_hundred_sessions_at_once(tmp_path: Path) -> None:
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    check(tiny("qwen2_5_vl"), tmp_path, 100, 5, 16, 2048, ["infinipot-v", "keydiff", "snapkv", "uniform"])
    assert (process.num_fds(), threading.active_count()) == before
