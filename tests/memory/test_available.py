"""How much memory there is, and what is refused by it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millpond import BudgetError, Session, SessionConfig, models
from millpond.cli import app
from millpond.device import default_budget, minimum_budget
from millpond.memory import available
from millpond.memory.available import available_memory, check_memory
from tests.models.tiny import tiny


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_count_with_their_parents_and_give_up_cached_files(tmp_path: Path) -> None:
    stat = "anon 5\nactive_file 30\ninactive_file 20\n"
    write(tmp_path / "fs/a/b", memory__max="max", memory__current="100", memory__stat=stat)
    write(tmp_path / "fs/a", memory__max="1000", memory__current="400", memory__stat=stat)
    write(tmp_path / "fs", memory__max="5000", memory__current="400", memory__stat=stat)
    proc = tmp_path / "cgroup"
    proc.write_text("0::/a/b\n")
    assert available._groups(proc, tmp_path / "fs") == [650, 4650]
    proc.write_text("0::/not/mounted/here\n")
    assert available._groups(proc, tmp_path / "fs") == [4650]
    old = {"memory__limit_in_bytes": "800", "memory__usage_in_bytes": "900"}
    write(tmp_path / "fs/memory", **old, memory__stat="total_active_file 1\ntotal_inactive_file 2\n")
    proc.write_text("4:cpu,memory:/\n1:name=systemd:/x\n")
    assert available._groups(proc, tmp_path / "fs") == [0]
    assert available._groups(tmp_path / "missing", tmp_path) == []


def test_the_machine_says_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1500 kB\n")
    assert available._machine(tmp_path) == 1500 * 1024
    assert (available._machine(tmp_path / "missing") or 0) > 1 << 20
    there = available_memory()
    assert there is not None
    check_memory(1)
    with pytest.raises(BudgetError, match="more than the memory that there is"):
        check_memory(there * 1000)


def test_a_budget_above_the_memory_is_refused_at_the_start_and_on_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen2_5_vl")
    with pytest.raises(BudgetError, match="more than the memory that there is") as caught:
        Session(family, budget="100TiB")
    assert "\n" not in str(caught.value)
    session = Session(family, budget="1MiB")
    before = session.usage
    with pytest.raises(BudgetError, match="more than the memory that there is"):
        session.resize("100TiB")
    assert session.plan.budget == 1 << 20
    assert session.usage.allocated_bytes == before.allocated_bytes
    with pytest.raises(BudgetError, match="more than the memory that there is"):
        Session(family, budget="1MiB", policy="rekv", host_budget="100TiB")


@pytest.mark.parametrize("words", [["plan"], ["watch", "nothing.mp4"]])
def test_the_command_line_says_so_in_one_line(words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*words, "--budget", "100TiB"])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    if words[0] == "plan":
        assert "more than the memory that there is" in result.stderr


def test_the_default_budget_suits_the_model_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config, frame = SessionConfig(), (64, 64)
    family = models.load("minnow")
    size = default_budget(family, config, frame)
    assert size % (1 << 20) == 0
    session = Session.from_pretrained("minnow", frame_size=(64, 64))
    assert session.plan_for(64, 64).budget == size
    assert session.plan_for(64, 64).seconds_in_full(2) >= 60
    assert default_budget(family, config, frame, fps=20) > size
    monkeypatch.setattr("millpond.device.available_memory", lambda device: 2 << 20)
    assert default_budget(family, config, frame, fps=2000) == 1 << 20
    monkeypatch.setattr("millpond.device.available_memory", lambda device: 1000)
    assert default_budget(family, config, frame) == minimum_budget(family, family.grid(*frame), config)
    found = json.loads(CliRunner().invoke(app, ["plan", "--size", "64x64", "--json"]).stdout)
    assert found["budget"] > 0
