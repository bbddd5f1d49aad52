"""Each bench runs with tiny numbers and writes the JSON that the README's figures are read from. No figure is asserted."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def run(script: str, out: Path, *options: str) -> dict[str, Any]:
    """Run a bench as its reader would; return the JSON that it wrote."""
    command = [sys.executable, str(BENCH / script), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    check_machine(result["machine"])
    assert "shared" in result["noise"]
    return result


def check_machine(machine: dict[str, Any]) -> None:
    assert set(machine) == {"cpu", "cores", "memory_gib", "gpu", "os", "python", "torch", "transformers", "threads"}
    assert machine["threads"] == 1
    assert machine["memory_gib"] > 0
    # A description is published: neither this host's name nor a path may be in it.
    text = json.dumps(machine)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def finite(values: Any) -> bool:
    """Whether every number in nested dicts is finite."""
    if isinstance(values, dict):
        return all(finite(value) for value in values.values())
    return not isinstance(values, float) or math.isfinite(values)


@pytest.mark.slow
def test_endless(tmp_path: Path) -> None:
    out = tmp_path / "results" / "endless.json"
    result = run("endless.py", out, "--frames", "160", "--window", "20", "--limit", "128", "--budget", "200KiB")
    assert result["frames"] == 160
    assert [window["frames"] for window in result["windows"]] == list(range(20, 161, 20))
    summary = result["summary"]
    assert finite(summary)
    for name in ("wall_ms", "cpu_ms", "vision_ms", "decoder_ms", "compaction_ms"):
        assert set(summary["ms_per_frame"][name]) == {"start", "middle", "end"}
    assert set(summary["paired"]) >= {"old_cpu_ms", "new_cpu_ms", "old_over_new"}
    walked = [window for window in result["windows"] if window["tensor_bytes"] >= 0]
    assert [window["frames"] for window in walked] == [20, 80, 160]
    for window in walked:
        # What the garbage collector finds agrees with the ledger, and both stay under the cap.
        assert 0 < window["live_bytes"] <= window["tensor_bytes"] <= result["budget_bytes"]
        assert window["tensor_bytes"] == window["storage_bytes"]
    for window in result["windows"]:
        assert window["storage_bytes"] <= window["allocated_bytes"] <= window["peak_bytes"] <= result["budget_bytes"]
    assert summary["compactions"] > 0
    assert summary["reanchorings"] > 1


def test_endless_refuses_a_window_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", ["endless.py", "--frames", "100", "--window", "30"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH / "endless.py"), run_name="__main__")
    assert left.value.code == 2
    assert "--window" in capsys.readouterr().err


@pytest.mark.slow
def test_batching(tmp_path: Path) -> None:
    result = run(
        "batching.py", tmp_path / "batching.json", "--small", "--sessions", "2", "--steps", "2", "--rounds", "2"
    )
    assert set(result["results"]) == {"minnow", "large, float32", "large, bfloat16"}
    for found in result["results"].values():
        for each in found.values():
            assert finite(each)
            assert each["quartiles"][0] <= each["ratio"] <= each["quartiles"][1]
    assert result["results"]["minnow"]["decoding"]["same_tokens"]


@pytest.mark.slow
def test_engine(tmp_path: Path) -> None:
    out, drawn = tmp_path / "engine.json", tmp_path / "engine.png"
    small = ("--frames", "16", "--rounds", "1", "--streams", "2", "--load", "1,2", "--seconds", "3")
    result = run("engine.py", out, "--png", str(drawn), *small, "--sessions", "6", "--room", "2")
    assert finite(result)
    asleep = result["hibernation"]
    assert asleep["answers_equal_to_never_hibernated"].startswith("6 of 6 sessions")
    assert asleep["held_bytes_most"] <= asleep["bytes"]
    assert asleep["wakings"] >= 4
    assert asleep["descriptors_left"] == asleep["threads_left"] == 0
    assert result["at_once"]["same_tokens"]
    for row in result["load"]:
        for name in ("first_token_ms", "ingest_lag_ms"):
            assert 0 < row[name]["p50"] <= row[name]["p99"]
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_overhead(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    result = run("overhead.py", out, "--small", "--layers", "1", "--slots", "1600", "--blocks", "2")
    assert set(result["results"]) == {"float32"}
    found = result["results"]["float32"]
    assert finite(found)
    assert found["blocks"] == 2
    assert found["frame_tokens"] == 144
    assert found["compactions"] > 0
    for name in ("share_of_totals", "share_median_block"):
        assert 0 < found[name] < 1
    for name in ("decoder_ms_a_block", "compaction_ms_a_block"):
        assert 0 < found[name]["least"] <= found[name]["median"] <= found[name]["most"]


@pytest.mark.slow
def test_streams(tmp_path: Path) -> None:
    small = ("--streams", "4", "--watched", "1", "--groups", "16", "--levels", "plain", "video-fine")
    result = run("streams.py", tmp_path / "streams.json", *small)
    assert set(result["levels"]) == {"plain", "video-fine"}
    for row in result["levels"].values():
        assert finite(row)
        assert row["frames_a_second"] > 0
        assert 0 < row["separability"]["event_tokens"] < 1
    found = result["levels"]["video-fine"]["blind"]["16"]
    assert found["derivable"] == 1
    assert 0 <= found["types"]["all"]["most_frequent"] <= found["types"]["all"]["last_frames"] <= 1
