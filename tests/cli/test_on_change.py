"""The program that is run for changes: whatever it does, whoever puts a change waits for nothing."""

import json
import threading
from pathlib import Path
from time import monotonic

import pytest

from millpond.cli.on_change import ChangeCommand, Runs


def faults(command: ChangeCommand) -> list[str]:
    return [command.faults.get() for _ in range(command.faults.qsize())]


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("script", "runs", "fault"),
    [
        ("exit 0", Runs(ran=1), None),  # reads nothing of what is more than a pipe holds
        ("exec 0<&-; sleep 0.1", Runs(ran=1), None),
        ("yes | head -c 1000000", Runs(ran=1), None),
        ("exit 7", Runs(ran=1, failed=1), "failed with exit code 7"),
        ("kill -9 $$", Runs(ran=1, failed=1), "was ended by signal 9"),
        ("sleep 1000", Runs(stopped=1), "was ended after 0.5 s"),
        ("trap '' TERM; sleep 1000; sleep 1000", Runs(stopped=1), "was ended after 0.5 s"),
    ],
)
def test_whatever_the_program_does(script: str, runs: Runs, fault: str | None) -> None:
    command = ChangeCommand(["sh", "-c", script], patience_seconds=0.5, quiet=True)
    command.put("q", {"text": "x" * 300_000})
    command.finish(never)
    assert command.runs == runs
    assert faults(command) == ([] if fault is None else [f"the command of --on-change {fault}"])
    assert not command._thread.is_alive()


def test_a_program_that_is_gone_meanwhile_is_told_once(tmp_path: Path) -> None:
    command = ChangeCommand([str(tmp_path / "gone")], apart_seconds=0)
    for number in range(3):
        command.put(number, {})
    command.finish(never)
    assert command.runs == Runs(not_started=3)
    assert faults(command) == ["the command of --on-change could not be run: No such file or directory"]


def test_what_changes_while_one_runs_is_told_the_latest_of_each_question(tmp_path: Path) -> None:
    told, go = tmp_path / "told", tmp_path / "go"
    script = f"cat >> {told}; while [ ! -e {go} ]; do sleep 0.01; done"
    command = ChangeCommand(["sh", "-c", script], apart_seconds=3600)
    command.put("a", {"number": 0})
    until = monotonic() + 30
    while not told.exists() and monotonic() < until:
        threading.Event().wait(0.01)
    for number in range(1, 1000):
        command.put("a", {"number": number})
        command.put("b", {"number": -number})
    go.touch()
    command.finish(never)  # an hour between two starts does not count at the end
    assert [json.loads(line)["number"] for line in told.read_text().splitlines()] == [0, 999, -999]
    assert command.runs == Runs(ran=3, replaced=1996)


def test_who_is_in_a_hurry_waits_for_what_runs_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.cli.on_change._GRACE_SECONDS", 0.2)
    command = ChangeCommand(["sleep", "1000"], apart_seconds=0)
    for number in range(3):
        command.put(number, {})
    while command._process is None:
        threading.Event().wait(0.01)
    command.finish(lambda: True)
    assert command.runs.given_up == 2
    assert command.runs.failed == 1
    assert not command._thread.is_alive()
    command.put("late", {})
    assert command.runs.ran == 1
