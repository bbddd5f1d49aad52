"""`millpond watch --every` and `--on-change`: what is printed, noted and run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from millpond.cli.every import Every, read_every
from millpond.eval import streams
from tests.cli.test_watch import last_object, millpond, watch

NOW = "Which object is there now?"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "drawn.mp4"
    streams.generate(7, groups=24, level="plain").write(path)
    return path


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30s a b", 30),
        ("2m a b", 120),
        ("0.5s  a b", 0.5),
        (".5 a b", 0.5),
        ("1h a b", 3600),
        ("100ms a b", 0.1),
        ("7. a b", 7),
    ],
)
def test_an_interval_and_its_question(value: str, seconds: float) -> None:
    assert read_every(value) == Every(seconds, "a b")


@pytest.mark.parametrize(
    "value",
    ["", "30s", "30s  ", "a b", "-1s a", "0s a", "nan a", "inf a", "1e3 a", "3d a", "30 s", "999999999h a", "3 s"],
)
def test_what_is_no_interval_or_no_question(value: str) -> None:
    if value in ("30 s", "3 s"):
        assert read_every(value).question == "s"
    else:
        with pytest.raises(typer.BadParameter):
            read_every(value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--every", "often who is there"), "does not begin with an interval"),
        (("--every", "30s"), "no question after 30s"),
        (("--every", b"30s \xff".decode(errors="surrogateescape")), "not valid UTF-8"),
        (("--on-change", "true"), "where there is an --every"),
        (("--every", "30s a", "--on-change", "no-such-program -x"), "there is no program 'no-such-program'"),
        (("--every", "30s a", "--on-change", "'"), "cannot be split"),
        (("--every", "30s a", "--on-change", " "), "the command is empty"),
        (("--every", "30s a", "--on-change", "true", "--on-change-every", "-1"), "--on-change-every"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(clip: Path, words: tuple[str, ...], told: str) -> None:
    result = millpond("watch", clip, *words)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", "").split())


def test_answers_are_told_as_they_come_and_changes_run_the_command(film: Path, tmp_path: Path) -> None:
    told, noted = tmp_path / "told", tmp_path / "events"
    command = shlex.join(["sh", "-c", f"cat >> {told}"])
    words = ("--every", f"2s {NOW}", "--every", "40s how many", "--on-change", command, "--on-change-every", 0)
    result = watch(film, "minnow", *words, "--events", noted, "--budget", "1MiB", "--json")
    assert result.exit_code == 0, result.stderr
    *lines, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["standing"] * 11
    assert [line["at_seconds"] for line in lines] == [2.0 * number for number in range(1, 12)]
    assert {line["kind"] for line in lines} == {"changed", "same"}
    assert lines[-1]["counts"]["answered"] == 11
    counted, rare = end["standing"]
    assert counted == {"question": NOW, "every_seconds": 2.0, "answer": lines[-1]["answer"], **lines[-1]["counts"]}
    assert rare["answered"] == 0
    changes = [line for line in lines if line["kind"] == "changed"]
    runs = end["on_change"]
    assert runs["ran"] + runs["replaced"] == len(changes) == counted["changed"] > 2
    ran = [json.loads(line) for line in told.read_text().splitlines()]
    assert len(ran) == runs["ran"]
    # The newest change is always told; what is told of each is what was printed.
    assert ran[-1] == {name: value for name, value in changes[-1].items() if name != "event"}
    events = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [event["answer"] for event in events if event["event"] == "standing"] == [line["answer"] for line in lines]
    assert "every 2 s, Which object is there now?: answered 11 times" in result.stderr
    assert f"the command of --on-change was run {runs['ran']} times" in result.stderr


def test_for_a_person_and_with_nothing_on_stderr(clip: Path, model: str) -> None:
    result = watch(clip, model, "--every", "4s what is there", "--ask", "at the end", "--quiet", "--budget", "2MiB")
    assert result.exit_code == 0
    assert result.stderr == ""
    first, _, second, text, *_ = result.stdout.splitlines()
    assert (first, second) == ("[00:04.0] what is there", "[00:08.0] what is there")
    assert text.endswith((" (same)", " (changed)"))
    assert "at the end" in result.stdout


def test_a_question_that_does_not_fit_is_said_once_and_the_stream_goes_on(clip: Path, model: str) -> None:
    words = ("--every", f"2s {'word ' * 4000}", "--every", "4s what is there", "--budget", "2MiB", "--json")
    result = watch(clip, model, *words)
    assert result.exit_code == 1
    end = last_object(result)
    assert [(each["answered"], each["failed"]) for each in end["standing"]] == [(0, 4), (2, 0)]
    assert end["usage"]["frames_seen"] == 20
    assert "does not fit" in end["error"]
    assert result.stderr.count("error: ") == 1


def test_a_command_that_fails_is_said_and_stalls_nothing(clip: Path, model: str) -> None:
    result = watch(clip, model, "--every", "2s what is there", "--on-change", "sh -c 'exit 3'", "--budget", "2MiB")
    assert result.exit_code == 0
    assert "the command of --on-change failed with exit code 3" in result.stderr
    assert "1 failed" in result.stderr


@pytest.mark.slow
def test_interrupts_leave_no_child_behind(
    long_clip: Path, model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """A command that ignores what asks it to end, with a child of its own."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM INT; sleep 1000 & echo $$ $! > {pids}; wait; wait"
    words = [
        "watch",
        str(long_clip),
        "--model",
        model,
        "--every",
        "1s what",
        "--on-change",
        shlex.join(["sh", "-c", script]),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", *words, "--max-new-tokens", "2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in children)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat: list[Any] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return stat[0] != "Z"  # who has ended waits for whoever reaps orphans
