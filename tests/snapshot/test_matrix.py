"""A session that was saved and loaded is the one that was never interrupted: one case a mechanism, held to a twin."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from millpond import Session, policies
from millpond.models.base import Family
from millpond.snapshot.state import values_of
from tests.models.tiny import tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.test_faults import QUESTION
from tests.session.test_state import attributes


@dataclass(frozen=True)
class Case:
    """A stream of 41 frames, an odd one of which waits for its group where groups hold two.

    Attributes:
        family: of the tiny model. dtype, limit: of its weights, and the positions that it was trained on.
        arguments: of the session. turn: whether a question is remembered before it is saved.
        slots: of the budget beside the prompt, in frame groups.
    """

    family: str = "qwen2_5_vl"
    arguments: dict[str, Any] = field(default_factory=dict)
    turn: bool = True
    dtype: torch.dtype = torch.float32
    limit: int = 32768
    slots: float = 14.0

    def model(self) -> Family:
        return tiny(self.family, dtype=self.dtype, max_position_embeddings=self.limit)

    def session(self, family: Family) -> Session:
        if self.arguments["policy"] == "full":
            return Session(family, **self.arguments)
        plan = Session(family, budget="8MiB", **self.arguments).plan_for(56, 56)
        slots = plan.prompt_tokens + self.slots * plan.group_tokens + 40
        extra = plan.waiting_bytes + plan.recent_bytes + plan.state_bytes
        return Session(family, budget=int(slots * plan.bytes_per_token) + extra, **self.arguments)

    def before(self, session: Session) -> None:
        session.feed(list(moving(38)))
        if self.turn:
            session.ask(QUESTION, max_new_tokens=3, remember=True)
        session.feed(list(moving(3, start=60, seed=1)))

    def after(self, session: Session) -> list[object]:
        """What else happens, and what comes of it."""
        seen: list[object] = []
        session.feed(list(moving(5, start=80, seed=2)))
        seen.append(session.ask(QUESTION, max_new_tokens=3, remember=self.turn).token_ids)
        session.feed(list(moving(14, start=90, seed=3)))
        if session.policy.capped:
            session.resize(session.plan.total_bytes + 60_000)
            session.feed(list(moving(4, start=120, height=80, seed=4)))
        seen.append(session.ask(QUESTION, max_new_tokens=3).token_ids)
        return seen


CASES = {
    "admission, recent frames": Case(
        arguments={"policy": "infinipot-v", "admission": "curvestream", "recent_frames": 3}, slots=24
    ),
    "quantized tier, accumulated attention": Case(
        "qwen2_vl", {"policy": "mikv:group=8:full_share=0.4:base=h2o", "system": "be brief"}, slots=24
    ),
    "layer budgets, queries, re-anchoring": Case(
        "qwen3_vl", {"policy": "cake+cake", "positions": "absolute"}, limit=250, slots=24
    ),
    "host memory": Case("llava_onevision", {"policy": "rekv", "host_budget": "1MiB"}, turn=False, limit=600, slots=24),
    "a proxy text, closed gaps, bfloat16": Case(
        "llava_next_video", {"policy": "streammem"}, dtype=torch.bfloat16, limit=400, slots=20
    ),
    "no cap": Case(arguments={"policy": "full"}),
}


def plainly(name: str) -> Case:
    """A policy by its name and nothing else."""
    needs = policies.get(name).needs
    family = "llava_onevision" if needs.whole_frames or needs.retrieved_frames else "qwen2_5_vl"
    host = {"host_budget": "1MiB"} if needs.retrieved_frames else {}
    return Case(family, {"policy": name, **host}, turn=False, slots=40)


EVERY = {policy.name: plainly(policy.name) for policy in policies.available()}


@pytest.mark.parametrize("name", nightly([*CASES, *EVERY], but=[*CASES]))
def test_a_loaded_session_is_the_one_that_was_never_interrupted(name: str, tmp_path: Path) -> None:
    case = {**CASES, **EVERY}[name]
    family, path = case.model(), tmp_path / "session.snapshot"
    twin, saved = case.session(family), case.session(family)
    for session in (twin, saved):
        case.before(session)
    saved.save(path)
    assert bits(saved) == bits(twin), "saving changes nothing"
    loaded = Session.load(path, case.model())
    assert bits(loaded) == bits(twin)
    assert everything(loaded) == everything(saved)
    assert counts(loaded) == counts(saved)
    assert counts(loaded, "peak_bytes") == counts(twin, "peak_bytes")
    assert loaded.config == twin.config
    done = case.after(twin)
    assert case.after(loaded) == done
    assert bits(loaded) == bits(twin)
    assert counts(loaded, "peak_bytes") == counts(twin, "peak_bytes")
    usage = twin.usage
    if usage.budget_bytes is not None:
        assert usage.compactions > 0
        assert usage.peak_bytes <= usage.budget_bytes
        assert loaded.usage.peak_bytes <= usage.budget_bytes
    if case.limit < 32768:
        assert usage.reanchorings > 0


def bits(session: Session) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything that it goes on with, bit for bit; without wall time and the most it ever held."""
    values, tensors = values_of(session._runner, session._ingest)
    for name in ("seconds", "peak_bytes"):
        del values[name]
    if values["host"] is not None:
        del values["host"]["seconds"]
    kept = {name: torch.as_tensor(stored).contiguous().view(torch.uint8) for name, stored in tensors.items()}
    return values, {name: tensor.numpy().tobytes() for name, tensor in kept.items()}


def everything(session: Session) -> dict[str, object]:
    """Every attribute of its stream by path, found without knowing what is saved.

    A plan notes what it was asked, so it is compared whole; who has or had access is each session's own.
    """
    shared = {id(session.family), id(session.family.rope)}
    found = dict(attributes({"runner": session._runner, "ingest": session._ingest}, "session", shared))
    return {path: value for path, value in found.items() if not {"plan", "access"} & set(path.split("."))} | {
        "plan": session.plan
    }


def counts(session: Session, *but: str) -> dict[str, object]:
    """All of its usage but wall time, and `but` what is named."""
    usage = session.usage.to_dict()
    return {name: value for name, value in usage.items() if not name.startswith("seconds_") and name not in but}


def test_a_session_that_has_seen_nothing_goes_on_as_it(tmp_path: Path) -> None:
    family, path = tiny("llava_onevision"), tmp_path / "empty"
    session = Session(family, budget=400_000, policy="recent")
    session.save(path)
    loaded = Session.load(path, family)
    for each in (session, loaded):
        each.feed(list(moving(3)))
    assert bits(loaded) == bits(session)


def test_seconds_and_peak_go_on(tmp_path: Path) -> None:
    family, path = tiny("qwen2_5_vl"), tmp_path / "saved"
    session = Session(family, budget="1MiB")
    session.feed(list(moving(9)))
    session.ask(QUESTION, max_new_tokens=2)
    session.save(path)
    assert Session.load(path, family).usage.to_dict() == session.usage.to_dict()


@pytest.mark.parametrize("share", [0.6, 1.7])
def test_another_budget_is_loading_and_then_resizing(share: float, tmp_path: Path) -> None:
    case = CASES["quantized tier, accumulated attention"]
    family, path = case.model(), tmp_path / "saved"
    session = case.session(family)
    case.before(session)
    session.save(path)
    budget = int(session.plan.total_bytes * share)
    loaded = Session.load(path, family, budget=budget)
    session.resize(budget)
    assert bits(loaded) == bits(session)
    assert loaded.plan == session.plan


def test_what_is_loaded_can_be_saved_again_and_is_the_same_file(tmp_path: Path) -> None:
    case = CASES["admission, recent frames"]
    session = case.session(case.model())
    case.before(session)
    one, other = tmp_path / "one", tmp_path / "other"
    session.save(one)
    Session.load(one, session.family).save(other)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("by", [1, 2_000, 40_000])
def test_a_plan_that_was_reached_by_resizing_is_the_same_afterwards(by: int, tmp_path: Path) -> None:
    """A step too small to be worth a second copy leaves the storage as it is, and the plan with its slots."""
    case = CASES["layer budgets, queries, re-anchoring"]
    family, path = case.model(), tmp_path / "saved"
    session = case.session(family)
    case.before(session)
    session.resize(session.plan.budget + by)
    session.save(path)
    loaded = Session.load(path, family)
    assert loaded.plan == session.plan
    assert bits(loaded) == bits(session)
