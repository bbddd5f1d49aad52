"""`millpond eval` as a user runs it: stopped and gone on with, in parts, with videos that are missing; and its tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from millpond import minnow, models
from millpond.cli.main import app
from millpond.eval.benchmarks import BENCHMARKS
from millpond.eval.benchmarks.run import model_fingerprint
from tests.eval.benchmarks import published

ARMS = ["full", "last-4-frames", "uniform", "recent", "infinipot-v"]


def command(name: str, data: Path, out: Path, *more: str) -> list[str]:
    return ["eval", name, "--data", str(data), "--out", str(out), *more]


def evaluate(name: str, data: Path, out: Path, *more: str, code: int = 0, budget: str = "1MiB") -> dict[str, Any]:
    """The object that it prints."""
    given = [] if "--merge" in more else ["--budget", budget]
    result = CliRunner().invoke(app, command(name, data, out, *given, "--json", *more))
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Its rows without wall times."""
    return [{key: value for key, value in row.items() if key != "seconds_spent"} for row in result["rows"]]


def lines(folder: Path, file: str = "answers.jsonl") -> list[str]:
    return (folder / file).read_text().splitlines()


ALSO = [
    pytest.param(name, marks=pytest.mark.nightly) for name in BENCHMARKS if name not in ("egoschema", "streamingbench")
]


@pytest.mark.parametrize("name", ["egoschema", pytest.param("streamingbench", marks=pytest.mark.slow), *ALSO])
def test_every_benchmark_runs_from_its_folder_to_its_table(tmp_path: Path, name: str) -> None:
    published.FOLDERS[name](tmp_path / "data")
    result = evaluate(name, tmp_path / "data", tmp_path / "out")
    asked = {"mlvu": 3, "egoschema": 2, "video-mme": 3, "longvideobench": 2, "ovo-bench": 6, "streamingbench": 10}
    assert [row["policy"] for row in result["rows"]] == ARMS
    for row in result["rows"]:
        capped = row["policy"] not in ("full", "last-4-frames")
        assert row["asked"] == asked.get(name, 2)
        assert row["budget_bytes"] == (1 << 20 if capped else None)
        assert row["left_out"] == {}
        assert row["effective_fps"] == 2.0
        assert row["memory_tokens"] > 0
        assert (row["total"] is None) == BENCHMARKS[name].judged
    table = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {name} |" in table for name in ARMS)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    if BENCHMARKS[name].judged:
        assert "2 of 2 answers are not judged: give --judge" in table
        assert result["judge"]["model"] is None
    settings = result["settings"]
    assert settings["model"] == "minnow"
    assert settings["versions"].keys() == {"millpond", "torch", "transformers"}


@pytest.mark.slow
def test_a_run_is_gone_on_with_and_another_is_not_mixed_in(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    published.ovo_bench(data)
    first = evaluate("ovo-bench", data, out)
    before = lines(out)
    assert len(before) == 2 * len(ARMS)
    # Cut off in the middle of a line, as by a crash: that pass is done again, the others are not.
    (out / "answers.jsonl").write_text("\n".join(before)[: -len(before[-1]) // 2])
    assert figures(evaluate("ovo-bench", data, out)) == figures(first)
    assert lines(out)[:9] == before[:9]
    # Another policy adds a row.
    more = evaluate("ovo-bench", data, out, "--policy", "keydiff")
    assert [row["policy"] for row in more["rows"]] == [*ARMS, "keydiff"]
    assert figures(more)[:5] == figures(first)
    count = len(lines(out))
    for other, what in (
        (("--fps", "1"), "fps (2.0, not 1.0)"),
        (("--positions", "absolute"), "positions ('contiguous', not 'absolute')"),
        (("--max-frames", "3"), "max_frames (None, not 3)"),
        (("--dtype", "bfloat16"), "dtype ('float32', not 'bfloat16')"),
    ):
        assert what in evaluate("ovo-bench", data, out, *other, code=1)["error"]
    assert "another budget (1048576, not 2097152)" in evaluate("ovo-bench", data, out, code=1, budget="2MiB")["error"]
    published.ovo_bench(data, [{**published_row(), "id": 77}])
    assert "another questions" in evaluate("ovo-bench", data, out, code=1)["error"]
    assert len(lines(out)) == count


def published_row() -> dict[str, Any]:
    choice = {"question": "Which?", "answer": "x", "options": ["x", "y", "z"], "gt": 0}
    return {"id": 9, "task": "EPM", "video": "COIN/one.mp4", "realtime": 5, **choice}


def test_a_model_is_known_by_what_it_is_not_by_where_it_lies(tmp_path: Path) -> None:
    def told(folder: str | Path, change: float = 0.0) -> str:
        family = models.load(folder, device="cpu")
        next(family.model.parameters()).data += change
        return model_fingerprint(family)

    copy = shutil.copytree(minnow.folder(), tmp_path / "elsewhere")
    assert told(copy) == told("minnow")
    assert told("minnow", 1e-3) != told("minnow")


def test_a_budget_that_was_too_small_does_not_hold_the_folder(tmp_path: Path) -> None:
    published.ego_schema(tmp_path / "data")
    # Enough for the prompt and a question, not for such frames beside them: nothing is watched.
    for budget in ("20KiB", "180KiB"):
        found = evaluate("egoschema", tmp_path / "data", tmp_path / "out", code=1, budget=budget)["error"]
        assert "the minimum that works is" in found
        assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert found.startswith("uniform, uid-a: ")
    evaluate("egoschema", tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
def test_shards_together_are_the_whole(tmp_path: Path) -> None:
    data, whole, parts = tmp_path / "data", tmp_path / "whole", tmp_path / "parts"
    published.mlvu(data)
    expected = evaluate("mlvu", data, whole)
    first = evaluate("mlvu", data, parts, "--shard", "1/2")
    assert first["rows"][0]["left_out"] == {"not asked yet": 1}
    unfinished = evaluate("mlvu", data, parts, "--merge", code=1)
    assert unfinished["rows"][0]["left_out"] == {"not asked yet": 1}
    # The second on another machine, its answers copied.
    evaluate("mlvu", data, tmp_path / "elsewhere", "--shard", "2/2")
    assert ({path.name for path in parts.glob("answers*")}, len(lines(parts, "answers.1-of-2.jsonl"))) == (
        {"answers.1-of-2.jsonl"},
        5,
    )
    (tmp_path / "elsewhere" / "answers.2-of-2.jsonl").rename(parts / "answers.2-of-2.jsonl")
    merged = evaluate("mlvu", data, parts, "--merge")
    assert figures(merged) == figures(expected)
    assert merged["settings"] == expected["settings"]


def test_what_cannot_be_asked_is_told_counted_and_left_out(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    published.ovo_bench(data, [{**published_row(), "gt": 7}])
    two = data / "src_videos" / "Ego4D" / "clips" / "two.mp4"
    kept = two.read_bytes()
    two.unlink()
    one = data / "src_videos" / "COIN" / "one.mp4"
    film = one.read_bytes()
    one.write_bytes(b"no film")
    result = CliRunner().invoke(app, command("ovo-bench", data, out, "--budget", "1MiB"))
    assert result.exit_code == 1
    told = [line for line in result.stderr.splitlines() if ".mp4" in line or "row" in line]
    assert told[0] == "ovo_bench_new.json, row 6: 'gt' must be the index of one of 3 options, not 7"
    assert told[1] == "there is no video Ego4D/clips/two.mp4"
    assert told[2].startswith("COIN/one.mp4 breaks off: ")
    assert len(told) == 3
    assert "left out: 1 (malformed row), 3 (missing video), 3 (broken video)" in result.stdout
    # Once they are there, what was left out is made up for.
    two.write_bytes(kept)
    one.write_bytes(film)
    after = evaluate("ovo-bench", data, out, code=1)
    assert [(row["asked"], row["left_out"]) for row in after["rows"]] == [(6, {"malformed row": 1})] * 5


def test_a_folder_without_any_video_stops_before_a_model_is_loaded(tmp_path: Path) -> None:
    published.rvs_ego(tmp_path / "data")
    (tmp_path / "data" / "ego" / "videos" / "v1.mp4").unlink()
    found = evaluate("rvs-ego", tmp_path / "data", tmp_path / "out", "--model", "nowhere", code=1)
    assert found["error"].startswith("nothing to ask: ")
    assert not (tmp_path / "out").exists()


def test_answers_that_are_not_public_are_written_for_the_server(tmp_path: Path) -> None:
    published.ego_schema(tmp_path / "data")
    (tmp_path / "data" / "subset_answers.json").unlink()
    result = evaluate("egoschema", tmp_path / "data", tmp_path / "out")
    assert {row["total"] for row in result["rows"]} == {None}
    sent = json.loads((tmp_path / "out" / "submission.infinipot-v.json").read_text())
    assert sent.keys() == {"uid-a", "uid-b", "uid-c"}
    assert set(sent.values()) <= set(range(5))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--budget", "1MiB", "--shard", "0/2"], "write 1/4, 2/4, 3/4 and 4/4"),
        (["--budget", "1MiB", "--shard", "3/2"], "write 1/4, 2/4, 3/4 and 4/4"),
        (["--merge", "--shard", "1/2"], "give --shard or --merge, not both"),
        ([], "give the bytes that a stream may take"),
        (["--budget", "1MiB", "--judge", "http://127.0.0.1:1/v1"], "MLVU needs no judge"),
    ],
)
def test_wrong_usage_is_told_and_does_nothing(tmp_path: Path, more: list[str], line: str) -> None:
    published.mlvu(tmp_path / "data")
    result = CliRunner().invoke(app, command("mlvu", tmp_path / "data", tmp_path / "out", *more))
    assert result.exit_code == 2
    assert line in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--budget", "1MiB", "--policy", "wisdom"], "no policy is called 'wisdom'"),
        (["--budget", "1MiB", "--policy", "rekv"], "rekv"),
        (["--merge"], "there are no answers in"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, more: list[str], line: str) -> None:
    published.mlvu(tmp_path / "data")
    result = CliRunner().invoke(app, command("mlvu", tmp_path / "data", tmp_path / "out", *more))
    assert result.exit_code == 1
    assert line in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert "no benchmark is called 'mvlu'" in CliRunner().invoke(app, command("mvlu", tmp_path, tmp_path)).stderr


@pytest.mark.slow
def test_a_killed_run_loses_no_answer(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    published.ovo_bench(data)
    words = [sys.executable, "-m", "millpond", *command("ovo-bench", data, out, "--budget", "1MiB", "--quiet")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    answers = out / "answers.jsonl"
    until = time.monotonic() + 60
    while not (answers.exists() and answers.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = answers.read_text().splitlines()
    assert 0 < len(kept) < 2 * len(ARMS)
    resumed = evaluate("ovo-bench", data, out)
    assert lines(out)[: len(kept)] == kept
    assert len(lines(out)) == 2 * len(ARMS)
    assert figures(resumed) == figures(evaluate("ovo-bench", data, tmp_path / "whole"))
