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
