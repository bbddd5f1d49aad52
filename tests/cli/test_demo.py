"""`millpond demo`: real video, the trained model, and figures that it measured."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millpond import frames
from millpond.cli import app


@pytest.mark.slow
def test_answers_stand_beside_the_truth_inside_a_sixteenth_of_the_full_cache(tmp_path: Path) -> None:
    saved = tmp_path / "demo.mp4"
    result = CliRunner().invoke(app, ["demo", "--groups", "160", "--save", str(saved), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout.splitlines()[-1])
    usage, answers = found["usage"], found["answers"]
    assert usage["frames_seen"] == 320
    assert usage["peak_bytes"] <= usage["budget_bytes"] <= usage["full_cache_bytes"] / 15.9
    assert usage["compactions"] > 10
    assert all(row["right"] == (row["answer"].strip().lower() == row["truth"].strip().lower()) for row in answers)
    assert sum(row["right"] for row in answers) >= 0.75 * len(answers) > 4
    with frames.open(saved) as clip:
        assert sum(1 for _ in clip) == 320


@pytest.mark.parametrize("groups", [16, 48])
def test_a_short_stream_gets_the_least_budget_that_works(groups: int) -> None:
    result = CliRunner().invoke(app, ["demo", "--groups", str(groups), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    usage = json.loads(result.stdout.splitlines()[-1])["usage"]
    assert usage["frames_seen"] == 2 * groups
    assert usage["full_cache_bytes"] / 16 < usage["budget_bytes"] < 2**20


@pytest.mark.parametrize(("arguments", "code"), [(["--policy", "none-such"], 1), (["--groups", "1"], 2)])
def test_bad_arguments(arguments: list[str], code: int) -> None:
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == code
