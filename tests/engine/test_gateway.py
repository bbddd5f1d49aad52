"""The family that an engine's sessions run on is the real one, in everything."""

from collections.abc import Iterator

import pytest
import torch

from millpond import Session
from millpond.engine.gateway import Gateway
from millpond.engine.scheduler import Scheduler
from millpond.models import Family
from tests.models.tiny import FAMILIES, tiny
from tests.session.frames import moving


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Family, Gateway]]:
    family = tiny(request.param)
    scheduler = Scheduler(family)
    yield family, Gateway(family, scheduler)
    scheduler.close()


def test_a_session_on_a_gateway_is_one_on_its_family(pair: tuple[Family, Gateway]) -> None:
    family, gateway = pair
    for name in ("name", "model_types", "any_size", "frames_per_group", "geometry", "rope", "hidden", "stop_ids"):
        assert getattr(gateway, name) == getattr(family, name)
    frames = list(moving(30))
    sessions = [Session(one, budget="220KiB", policy="h2o") for one in (gateway, family)]
    answers = []
    for session in sessions:
        session.feed(frames)
        answers.append(
            [session.ask("what is there", max_new_tokens=6, remember=keep).token_ids for keep in (True, False)]
        )
    assert sessions[0].usage.compactions > 0
    assert answers[0] == answers[1]
    mine, theirs = (session._runner.pond.storage.layers for session in sessions)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.keys[:, :, : one.length], other.keys[:, :, : other.length])
    hidden = torch.randn(3, family.hidden)
    assert torch.equal(gateway.logits(hidden), family.logits(hidden))
