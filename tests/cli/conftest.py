"""A tiny model in a folder and real MP4s, so that the whole path from the command line to the answer is the real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.clips import write_clip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as `save_pretrained` leaves it."""
    from tests.models.tiny import tiny

    folder = tmp_path_factory.mktemp("model")
    family = tiny("qwen2_5_vl")
    family.model.save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds at four frames a second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=40, fps=4)


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour of video at one frame a second: more than a test would ever watch."""
    return write_clip(tmp_path_factory.mktemp("clips") / "long.mp4", frames=3600, fps=1)


@pytest.fixture
def environment() -> dict[str, str]:
    """For subprocesses: this one's, without millpond's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}


@pytest.fixture
def spawn(environment: dict[str, str]):
    """Run `python -m millpond` to its end."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "millpond", *words],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
