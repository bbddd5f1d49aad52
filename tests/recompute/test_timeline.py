"""The picture of a plan and the command that prints it."""

import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from millpond.cli import app
from millpond.recompute import RecomputeError, plan

SIZES = {"hidden_bytes": 1000, "internal_bytes": 4500}
ARGUMENTS = ["recompute", "plan", "--length", "100", "--hidden-bytes", "1kB", "--internal-bytes", "4500"]


@pytest.mark.parametrize("strategy", ["hidden", "internal", "mixed"])
def test_stays_add_up_to_the_peak(strategy) -> None:
    made = plan(length=40, budget=30_000, strategy=strategy, **SIZES)
    timeline = made.timeline
    assert (timeline.length, timeline.forwards, timeline.forward_pass) == (40, made.forwards, 40)
    assert sorted(stay.step for stay in timeline.stays if stay.kind == "internal") == list(range(1, 41))
    assert sum(last - first + 1 for _, first, last in timeline.runs) == made.forwards
    bytes_of = {"hidden": 1000, "internal": 4500}
    at_once = [
        sum(bytes_of[stay.kind] for stay in timeline.stays if stay.since <= time < stay.until)
        for time in range(made.forwards)
    ]
    assert 0 < max(at_once) <= made.peak_bytes


def test_text() -> None:
    """State 2 is stored while steps 4 and 3 are dealt with, then state 1 while step 2 is."""
    drawing = plan(length=4, slots=1, strategy="hidden", **SIZES).timeline.text()
    assert drawing.splitlines()[:6] == [
        "1 |/    /hI",
        "2 | /hhh I",
        "3 |  / I",
        "4 |   I",
        "  +--------",
        "   0      8",
    ]


def test_text_fits_its_box() -> None:
    drawing = plan(length=1000, slots=20, **SIZES).timeline.text(width=70, height=15)
    lines = drawing.splitlines()
    assert len(lines) == 15 + 3
    assert max(len(line) for line in lines[:16]) <= 70 + len("1000 |")


def test_png(tmp_path) -> None:
    path = tmp_path / "plan.png"
    plan(length=50, budget=40_000, **SIZES).timeline.save_png(path, title="fifty steps")
    with Image.open(path) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_png_without_matplotlib(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecomputeError, match="plots"):
        plan(length=5, slots=2, **SIZES).timeline.save_png(tmp_path / "plan.png")
    result = CliRunner().invoke(app, [*ARGUMENTS, "--slots", "5", "--png", str(tmp_path / "plan.png")])
    assert result.exit_code == 1
    assert "plots" in result.output


def test_command(tmp_path) -> None:
    made = plan(length=100, budget="60KiB", **SIZES)
    result = CliRunner().invoke(app, [*ARGUMENTS, "--budget", "60KiB", "--png", str(tmp_path / "plan.png")])
    assert result.exit_code == 0
    assert f"{made.forwards} evaluations" in result.output
    assert made.timeline.text() in result.output
    assert (tmp_path / "plan.png").stat().st_size > 0
    result = CliRunner().invoke(app, [*ARGUMENTS, "--budget", "60KiB", "--strategy", "hidden", "--json"])
    answer = json.loads(result.output.splitlines()[-1])
    assert answer["forwards"] == plan(length=100, budget="60KiB", strategy="hidden", **SIZES).forwards
    assert answer["budget_bytes"] == 60 * 1024


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--budget", "4kB"], 1, "minimum that works is 4500"),
        ([], 1, "either budget"),
        (["--budget", "much"], 1, "much"),
        (["--strategy", "best", "--slots", "3"], 2, "best"),
    ],
)
def test_command_errors(extra, code, message) -> None:
    result = CliRunner().invoke(app, [*ARGUMENTS, *extra])
    assert result.exit_code == code
    assert message in result.output
