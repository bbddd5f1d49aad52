"""`millpond demo`: real video, a real session, and figures that it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from millpond import frames
from millpond.cli import app


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["demo", "--minutes", "5", *arguments, "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_a_few_per_cent_of_the_full_cache_and_truth_beside_the_answers(tmp_path: Path) -> None:
    found = run("--save", str(tmp_path / "demo.mp4"))
    usage = found["usage"]
    assert usage["frames_seen"] == 600
    assert usage["peak_bytes"] <= usage["budget_bytes"] <= usage["full_cache_bytes"] * 0.05
    assert usage["compactions"] > 3
    assert [row["truth"] for row in found["answers"]] == ["red", "green", "blue"]
    assert all(row["right"] == (row["answer"].strip().lower() == row["truth"]) for row in found["answers"])
    assert [row["at_seconds"] for row in found["answers"]] == [299.5] * 3
    with frames.open(tmp_path / "demo.mp4") as clip:
        shown = {frame.seconds: frame.pixels[50, 60] for frame in clip}
    for row, channel in zip(found["answers"], (0, 1, 2), strict=True):
        assert int(shown[row["event_seconds"] + 1].argmax()) == channel  # the square is really in the file


def test_what_is_still_in_memory_is_counted_not_claimed() -> None:
    assert run("--policy", "recent")["answers"][0]["remembered"] < 0.05
    by_rule = run("--policy", "infinipot-v")["answers"]
    assert all(0 <= row["remembered"] <= 1 for row in by_rule)


def test_the_table_says_that_the_weights_are_random() -> None:
    result = CliRunner().invoke(app, ["demo", "--minutes", "5", "--quiet"])
    assert result.exit_code == 0
    assert "random weights" in result.stdout
    assert "still in memory" in result.stdout


@pytest.mark.parametrize(("arguments", "code"), [(["--policy", "none-such"], 1), (["--minutes", "0"], 2)])
def test_bad_arguments(arguments: list[str], code: int) -> None:
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == code
