"""Frames go on while an answer is generated: the answer and the stream are bit for bit what they are without each other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from millpond import BudgetError, Session
from millpond.models.base import Family
from millpond.stream.holding import _waits
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.session.measure import held_bytes
from tests.session.test_faults import check_books, state_of

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
            if policy == "full" or plan.headroom_tokens >= 6 * plan.group_tokens:
                break
        except BudgetError:
            pass
        budget += 20_000
    session.feed(list(moving(3, fps=1)))
    for at in range(4, 2000, 2):
        before = session.usage.compactions
        session.feed(list(moving(2, start=at, fps=1, seed=at)))
        if at > 60 and (policy == "full" or 1 <= before < session.usage.compactions):
            return session
    raise AssertionError("it never compacted")


def fits(session: Session) -> bool:
    """Whether a block of frames can go in without waiting for a turn."""
    return not _waits(session._runner, session.plan.block_tokens, session.plan.block_tokens)


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


@pytest.mark.parametrize("policy", KINDS)
def test_an_answer_and_a_stream_do_not_see_each_other(policy: str) -> None:
    name, options = KINDS[policy]
    session = filled(policy, name, **options)
    alone, quiet = session.fork(), session.fork()
    at_rest = list(recorded(alone, asked(alone, 12)))
    news = list(moving(8, start=5000, seed=7, fps=1))
    compactions, met = session.usage.compactions, []
    asking = asked(session, 12)
    watching = []
    for piece in recorded(session, asking):
        watching.append(piece)
        if news and fits(session):
            frame = news.pop(0)
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
    more = list(moving(60, start=6000, seed=8, fps=1))
    for one in (session, quiet):
        one.feed(more)
    assert policy == "full" or session.usage.compactions > compactions
    assert state_of(session) == state_of(quiet)
    assert session.ask(QUESTION, max_new_tokens=4).token_ids == quiet.ask(QUESTION, max_new_tokens=4).token_ids
