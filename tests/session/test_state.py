"""The state of a stream is complete: what is made from it is the original in every attribute, and goes on as the original would."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from millpond import Session
from millpond.memory.ledger import Ledger
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.session.test_faults import QUESTION, filled, state_of


def attributes(thing: Any, path: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Every attribute within an object by its path: plain values as they are, tensors by shape, books by what is held."""
    if id(thing) in seen:
        return
    if isinstance(thing, torch.Tensor):
        yield path, (tuple(thing.shape), thing.dtype)
    elif isinstance(thing, Ledger):
        yield path, {name: size for name, size in thing._accounts.items() if size}  # a peak is each one's own
    elif isinstance(thing, dict):
        for name, value in thing.items():
            yield from attributes(value, f"{path}.{name}", seen)
    elif isinstance(thing, (list, tuple)):
        yield path, len(thing)
        for index, value in enumerate(thing):
            yield from attributes(value, f"{path}[{index}]", seen)
    elif type(thing).__module__.startswith("millpond") and hasattr(thing, "__dict__"):
        seen.add(id(thing))
        yield from attributes(vars(thing), path, seen)
    elif isinstance(thing, (int, float, str, bool, type(None))):
        yield path, thing


OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "infinipot-v": ("qwen2_5_vl", {"admission": "curvestream", "recent_frames": 2, "share": 0.9}),
    "mikv:group=8:full_share=0.4:base=h2o": ("qwen2_5_vl", {"system": "be brief"}),
    "cake+cake": ("qwen2_5_vl", {"positions": "absolute", "share": 2.2}),
    "rekv": ("llava_onevision", {"host_budget": "1MiB", "share": 2.2}),
}


@pytest.mark.parametrize("policy", OPTIONS)
def test_a_fork_is_the_original_in_every_attribute_and_goes_on_as_it(policy: str) -> None:
    name, options = OPTIONS[policy]
    family = tiny(name, max_position_embeddings=400 if policy == "rekv" else 70)
    session = filled(family, policy, 41, **options)  # type: ignore[arg-type]
    session.ask(QUESTION, max_new_tokens=2, remember=policy != "rekv")
    session.resize(session.plan.total_bytes + 40_000)
    session.feed(list(moving(3, start=60)))
    assert session.usage.reanchorings > 0
    if session._runner.pond.host is not None:
        assert session._runner.pond.host.span > 0

    def everything(of: Session) -> dict[str, object]:
        shared = {id(family), id(family.rope), id(of._runner.access)}
        return dict(attributes({"runner": of._runner, "ingest": of._ingest}, "session", shared))

    fork = session.fork()
    assert everything(fork) == everything(session)
    assert len(everything(fork)) > 100
    assert state_of(fork) == state_of(session)
    assert fork.usage.to_dict() | {"peak_bytes": 0} == session.usage.to_dict() | {"peak_bytes": 0}
    for one in (fork, session):
        one.feed(list(moving(8, start=80, seed=3)))
    assert state_of(fork) == state_of(session)
    assert fork.ask(QUESTION, max_new_tokens=4).token_ids == session.ask(QUESTION, max_new_tokens=4).token_ids


def test_a_fork_of_a_session_that_has_seen_nothing_goes_on_as_it() -> None:
    session = Session(tiny("llava_onevision"), budget=400_000, policy="recent")
    fork = session.fork()  # makes the memory, with the prompt in it
    assert state_of(fork) == state_of(session)
    for each in (session, fork):
        each.feed(list(moving(3)))
    assert state_of(fork) == state_of(session)
    assert fork.usage.stream_tokens == session.usage.stream_tokens
