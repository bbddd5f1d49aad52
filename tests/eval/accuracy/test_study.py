"""A study from the command line: two processes, resumed, its tables true to its outcomes."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from millpond.cli.main import app
from millpond.eval.accuracy import Cell, summarise
from millpond.eval.accuracy.run import Study, outcomes, run
from millpond.eval.accuracy.table import markdown
from millpond.eval.accuracy.trial import Mark, Outcome
from millpond.minnow import SUPPORTED

COMMAND = ["bench", "accuracy", "--groups", "24", "--budgets", "1/2", "--policies", "random", "--split", "train"]


def bench(*options: str) -> dict:
    result = CliRunner().invoke(app, [*COMMAND, "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_study_is_resumed_not_repeated(tmp_path: Path) -> None:
    first = bench("--streams", "2", "--out", str(tmp_path))
    lines = (tmp_path / "outcomes.jsonl").read_text().splitlines()
    assert len(lines) == 10
    # What every table is read against is measured without being asked for.
    capped = [f"{name} @ 1/2 contiguous" for name in ("uniform", "recent", "random")]
    cells = ["full @ - contiguous", "last-4-frames @ - contiguous", *capped]
    assert {(row.seed, row.cell) for row in outcomes(tmp_path)} == {(seed, cell) for seed in (0, 1) for cell in cells}
    # A crash in the middle of a line: that trial is done again, the others are not.
    (tmp_path / "outcomes.jsonl").write_text("\n".join(lines)[: -len(lines[-1]) // 2])
    again = bench("--streams", "2", "--out", str(tmp_path), "--processes", "1")
    strip = [{key: value for key, value in row.items() if "seconds" not in key} for row in first["rows"]]
    assert [{key: value for key, value in row.items() if "seconds" not in key} for row in again["rows"]] == strip
    kept = (tmp_path / "outcomes.jsonl").read_text().splitlines()
    assert kept[:9] == lines[:9]
    for name in ("accuracy.json", "accuracy.md", "accuracy.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert json.loads((tmp_path / "accuracy.json").read_text())["study"]["streams"] == 2


def test_another_study_does_not_mix_with_it(tmp_path: Path) -> None:
    assert [*run(Study("minnow", 1, 24, "standard", "train", SUPPORTED), [], tmp_path)] == [(0, 0)]
    result = CliRunner().invoke(app, [*COMMAND, "--streams", "1", "--level", "plain", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "another level ('standard')" in result.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--questions", "colour,taste"], "no question type is called 'taste'"),
        (["--level", "easy"], "'easy'"),
        (["--budgets", "half"], "half"),
        (["--policies", "wisdom"], "no policy is called 'wisdom'"),
    ],
)
def test_bad_input_gets_one_line(tmp_path: Path, options: list[str], line: str) -> None:
    result = CliRunner().invoke(app, [*COMMAND, *options, "--out", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "new" / "outcomes.jsonl").exists()


ages = st.none() | st.floats(0, 5000)
marks = st.builds(Mark, st.sampled_from(["colour", "now"]), ages, st.booleans())


@given(st.lists(marks, max_size=40))
def test_every_answer_is_counted_once_in_each_table(found: list[Mark]) -> None:
    cell = Cell("recent", Fraction(1, 2), "absolute")
    half = len(found) // 2
    rows = summarise(
        [cell], [Outcome(0, cell.name, found[:half]), Outcome(1, cell.name, found[half:])], ["colour", "now"]
    )
    (row,) = rows
    assert row["all"]["asked"] == len(found) == sum(share["asked"] for share in row["families"].values())
    assert row["all"]["right"] == sum(mark.right for mark in found)
    dated = [mark for mark in found if mark.age is not None]
    assert sum(share["asked"] for share in row["ages"].values()) == len(dated)
    assert row["past"]["asked"] == sum(mark.age >= 16 for mark in dated if mark.age is not None)
    assert markdown(rows).count("recent") == 3


def test_cells_are_paired_question_by_question_with_the_default_policy() -> None:
    def outcome(seed: int, cell: Cell, right: str) -> Outcome:
        return Outcome(seed, cell.name, [Mark("colour", 20.0, mark == "1") for mark in right])

    default, other, alone = (
        Cell(name, Fraction(1, part), "absolute") for name, part in (("infinipot-v", 2), ("keydiff", 2), ("keydiff", 4))
    )
    rows = summarise(
        [default, other, alone],
        [
            outcome(0, default, "1100"),
            outcome(1, default, "0000"),
            outcome(1, other, "1111"),  # in another order than the default's
            outcome(0, other, "0110"),
            outcome(2, other, "1111"),  # a stream that the default has not been through
            outcome(0, alone, "1111"),
        ],
        ["colour"],
    )
    duel = rows[1]["against_default"]
    assert [duel[key] for key in ("won", "lost", "asked", "streams", "difference")] == [5, 1, 8, 2, 0.5]
    assert duel["p"] == 1.0  # margins of 0 and 4: one stream alone differs, and may as well have differed the other way
    assert duel["p_holm"] == 1.0
    assert "against_default" not in rows[0]
    assert "against_default" not in rows[2]


def test_chances_are_adjusted_for_all_comparisons_of_the_table() -> None:
    default, *others = (Cell(name, Fraction(1, 2), "absolute") for name in ("infinipot-v", "keydiff", "recent"))
    right = {default: [True] * 6, others[0]: [False] * 6, others[1]: [True, *[False] * 5]}
    found = [
        Outcome(seed, cell.name, [Mark("colour", 20.0, marks[seed])])
        for cell, marks in right.items()
        for seed in range(6)
    ]
    rows = summarise([default, *others], found, ["colour"])
    assert [row["against_default"]["p"] for row in rows[1:]] == [0.03125, 0.0625]
    assert [row["against_default"]["p_holm"] for row in rows[1:]] == [0.0625, 0.0625]
    assert "| 0, 6 | 0.062 |" in markdown(rows)
