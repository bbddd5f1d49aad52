"""Kill -9 at random instants while feeding and saving: a bounded number of the rounds of `bench/crash.py`."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import tiny

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    return runpy.run_path(str(BENCH / "crash.py"))


@pytest.mark.slow
def test_every_acknowledged_snapshot_loads_and_none_is_half(bench: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "crash.json"
    family = tiny("qwen2_5_vl")
    bench["run"](4, 0, family, out, frames=60)
    crashes = bench["run"](16, 0, family, out, frames=60)  # goes on
    assert crashes.faults == []
    assert crashes.rounds == 16
    assert crashes.saves > 0
    assert sum(crashes.phases.values()) == 16
    assert bench["stored"](out) == crashes


def test_a_snapshot_that_is_lost_or_another_is_a_fault(bench: dict[str, Any], tmp_path: Path) -> None:
    made = bench["Bench"].__new__(bench["Bench"])
    made.family, made.path = tiny("qwen2_5_vl"), tmp_path / "session.snapshot"
    made.expected, made.least = ["another"] * 9, 2

    def faults() -> str:
        crashes = bench["Crashes"]()
        made._check(crashes)
        return " ".join(crashes.faults)

    assert "gone" in faults()
    made.path.write_bytes(b"half")
    assert "not a whole snapshot" in faults()
    made.path.unlink()
    session = bench["Session"](made.family, **bench["ARGUMENTS"])
    session.feed([bench["frame"](0)])
    session.save(made.path)
    assert "1 frames, 2 were acknowledged" in faults()
    assert "another memory" in faults()


def test_what_the_docs_say_of_it_is_what_is_stored() -> None:
    found = json.loads((BENCH / "results" / "crash.json").read_text())["summary"]
    said = " ".join((BENCH.parent / "docs" / "snapshots.md").read_text().split())
    assert found["faults"] == []
    told = f"Of {found['rounds']:,} kills, {found['phases']['saving']} fell into a save; every one of the {found['saves']} saves"
    assert told in said
