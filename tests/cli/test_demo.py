"""`millpond demo` on a short stream and a tiny model: the comparison it prints is the one it measured."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from millpond import ModelError, families
from millpond.cli import app
from millpond.frames import Frame
from tests.cli.clips import write_clip
from tests.session.frames import moving


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    event_seconds: float | None
    ask_seconds: float


@dataclass(frozen=True)
class Stream:
    """What the demo uses of a generated stream."""

    groups: int
    questions: tuple[Question, ...]

    def frames(self) -> Iterator[Frame]:
        return moving(2 * self.groups)

    def write(self, path: Path) -> None:
        write_clip(path, frames=2 * self.groups, fps=2)


@pytest.fixture
def short(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream asked about out of order, and a tiny model in Minnow's place."""
    family = families.load(model, device="cpu")
    questions = (Question("what last", "nothing like it", 30.0, 39.0), Question("what first", "red", 2.0, 20.0))
    monkeypatch.setattr("millpond.streams.generate", lambda seed, **_: Stream(240, questions), raising=False)
    monkeypatch.setattr(families, "load", lambda *_, **__: family)


def test_answers_stand_beside_the_truth_inside_a_sixteenth_of_the_full_cache(short: None) -> None:
    result = CliRunner().invoke(app, ["demo", "--groups", "240", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert [row["question"] for row in found["answers"]] == ["what first", "what last"]
    assert [row["at_seconds"] for row in found["answers"]] == [20.0, 39.0]
    assert [row["right"] for row in found["answers"]] == [False, False]
    usage = found["usage"]
    assert usage["frames_seen"] == 480
    assert usage["peak_bytes"] <= usage["budget_bytes"]
    assert usage["full_cache_bytes"] / 17 < usage["budget_bytes"] < usage["full_cache_bytes"] / 15


def test_the_table_and_the_kept_video(short: None, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--groups", "240", "--save", str(tmp_path / "kept.mp4")])
    assert result.exit_code == 0, result.output
    assert "nothing like it" in result.stdout
    assert "0 of 2 right" in result.stdout
    assert (tmp_path / "kept.mp4").stat().st_size > 1000


def test_without_the_model_it_is_one_line(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModelError("minnow is not here")

    monkeypatch.setattr(families, "load", missing)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr == "error: minnow is not here\n"
