"""`python -m millpond` as its own process: streams, signals, a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import millpond
from tests.nightly import nightly

pytestmark = pytest.mark.slow  # every test starts a process, which imports torch anew


def test_it_runs_as_a_module_and_streams_are_kept_apart(clip: Path, model: str, spawn) -> None:
    done = spawn("watch", str(clip), "--model", model, "--ask", "what is there", "--json", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["usage"]["frames_seen"] == 20
    assert "20 frames" in done.stderr
    assert "Traceback" not in done.stderr


def test_quiet_leaves_stderr_empty_in_a_real_process(clip: Path, model: str, spawn) -> None:
    done = spawn("watch", str(clip), "--quiet", "--ask", "what", MILLPOND_MODEL=model)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "what" in done.stdout


def test_version(spawn) -> None:
    done = spawn("--version")
    assert done.returncode == 0
    assert done.stdout == f"millpond {millpond.__version__}\n"


@pytest.mark.parametrize("number", nightly([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], but=[signal.SIGTERM]))
def test_a_signal_ends_the_stream_answers_and_sums_up(
    long_clip: Path, model: str, environment: dict[str, str], number: signal.Signals
) -> None:
    words = ["watch", str(long_clip), "--model", model, "--fps", "1", "--ask-at", "2", "now", "--ask", "what then"]
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", *words, "--max-new-tokens", "4"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "[00:02.0] now\n"  # in mid-stream
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "what then" in out
    assert "stopped" in err
    assert "Traceback" not in err
    (frames,) = re.findall(r"(\d+) frames", err)
    assert 3 <= int(frames) < 3600


@pytest.mark.parametrize("words", [("models",), ("models", "--json"), ("--version",)])
@pytest.mark.parametrize(("where", "told"), [(">/dev/full", "No space left on device"), (">&-", "closed")])
def test_results_that_have_nowhere_to_go_are_one_line(
    environment: dict[str, str], words: tuple[str, ...], where: str, told: str
) -> None:
    command = f"'{sys.executable}' -m millpond {' '.join(words)} {where}"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to stdout: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_read_enough_is_no_error(environment: dict[str, str]) -> None:
    command = f"'{sys.executable}' -m millpond models | true"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_a_plain_ascii_terminal_gets_everything(spawn) -> None:
    done = spawn("policies", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "keydiff" in done.stdout
    assert done.stdout.isascii()


def test_a_prompt_answers_while_the_stream_goes_on(long_clip: Path, model: str, environment: dict[str, str]) -> None:
    master, slave = pty.openpty()
    words = ["watch", str(long_clip), "--model", model, "--fps", "1", "-i", "--max-new-tokens", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", *words], env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        seen = _read_until(master, "] > ", process)
        os.write(master, b"what is there\n")
        seen += _read_until(master, "] > ", process)
        os.write(master, b"and now\n")
        seen += _read_until(master, "] > ", process)
        os.write(master, b"exit\n")
        seen += _read_until(master, "forgotten in", process)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)
    answers = [line for line in seen.splitlines() if line.endswith(("what is there", "and now")) and "] > " not in line]
    assert len(answers) == 2, seen
    assert "watched" in seen
    assert f"{3600} frames" not in seen


def test_ctrl_c_at_the_prompt_ends_it(long_clip: Path, model: str, environment: dict[str, str]) -> None:
    master, slave = pty.openpty()
    words = ["watch", str(long_clip), "--model", model, "--fps", "1", "-i"]
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", *words],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        _read_until(master, "] > ", process)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "watched" in _read_until(master, "forgotten in", process)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)


def _read_until(master: int, wanted: str, process: "subprocess.Popen[bytes]") -> str:
    """What the terminal shows up to a text that was not there before."""
    seen, deadline = "", time.monotonic() + 90
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                assert wanted in seen, seen
        else:
            assert process.poll() is None or wanted in seen, seen
    return seen
