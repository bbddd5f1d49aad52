"""A tiny model, and a small snapshot of a session on it."""

import pytest

from millpond import Session
from millpond.models.base import Family
from tests.models.tiny import tiny
from tests.session.frames import moving


@pytest.fixture(scope="session")
def family() -> Family:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="session")
def small(family: Family, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A snapshot of everything that one can hold, as small as can be."""
    session = Session(family, budget="300KiB", recent_frames=2, admission="curvestream")
    session.feed(list(moving(7)))
    path = tmp_path_factory.mktemp("small") / "saved"
    session.save(path)
    return path.read_bytes()
