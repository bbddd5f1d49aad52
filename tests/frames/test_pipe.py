"""Stdin and named pipes, in processes of their own where it matters."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from millpond import frames
from millpond.errors import SourceError
from millpond.frames import write_mp4
from tests.frames.media import gray, noise, write

WATCH = """
import signal
from millpond import frames
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background passes on that it is ignored
try:
    print("up", flush=True)
    with frames.open("-", fps=2) as source:
        for frame in source:
            print(frame.seconds, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def watch_stdin(content: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], str]:
    """Times of the frames in what a real pipe brings to stdin, and the error at their end."""
    out, into = os.pipe()

    def write_all() -> None:
        with suppress(BrokenPipeError), os.fdopen(into, "wb") as end:
            end.write(content)

    writer = threading.Thread(target=write_all)
    writer.start()
    seconds: list[float] = []
    error = ""
    with os.fdopen(out) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            with frames.open("-", fps=2) as source:
                assert (source.info.kind, source.info.name, source.info.live) == ("pipe", "stdin", False)
                for frame in source:
                    seconds.append(frame.seconds)
        except SourceError as fault:
            error = str(fault)
    writer.join()
    return seconds, error


def test_an_mp4_with_its_index_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(5 * i)) for i in range(30)], fps=10)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert watch_stdin(content, monkeypatch) == ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], "")


def test_matroska_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write(tmp_path / "clip.mkv", noise(60)).read_bytes()
    seconds, error = watch_stdin(content[: len(content) // 2], monkeypatch)
    assert seconds[:4] == [0.0, 0.5, 1.0, 1.5]
    assert error.startswith("stdin ")


def test_an_mp4_with_its_index_behind_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Larger than what FFmpeg can look ahead on a pipe.
    content = write(tmp_path / "clip.mp4", noise(60, 144, 192)).read_bytes()
    seconds, error = watch_stdin(content, monkeypatch)
    assert seconds == []
    assert "faststart" in error


@pytest.mark.parametrize("content", [b"", b"no video here\n" * 100, b"ffconcat version 1.0\nfile clip.mp4\n"])
def test_no_video_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    write_mp4(tmp_path / "clip.mp4", [(0.0, gray(0))], fps=10)
    monkeypatch.chdir(tmp_path)  # a playlist on stdin must not open what lies here
    seconds, error = watch_stdin(content, monkeypatch)
    assert seconds == []
    assert "stdin" in error


@pytest.mark.parametrize("whole", [False, True])
def test_ctrl_c_while_stdin_is_silent(tmp_path: Path, whole: bool) -> None:
    content = write(tmp_path / "clip.mkv", noise(60)).read_bytes()
    child = subprocess.Popen([sys.executable, "-c", WATCH], stdin=-1, stdout=-1, stderr=-1)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    child.stdin.write(content if whole else content[:100])
    child.stdin.flush()
    if whole:
        assert child.stdout.readline() == b"0.0\n"
    time.sleep(0.5)  # so that it waits for bytes; earlier it would end just the same
    child.send_signal(signal.SIGINT)
    said, complaints = child.communicate(timeout=60)
    assert child.returncode == 0
    assert said.splitlines()[-1] == b"interrupted"
    assert complaints == b""


def test_stdin_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SourceError, match="stdin"):
        frames.open("-")


def test_a_terminal_is_no_video(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(SourceError, match="terminal"):
            frames.open("-")
    os.close(ours)


def test_a_named_pipe(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", noise(30))
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(path.read_bytes()))
    writer.start()
    with frames.open(tmp_path / "fifo") as source:
        assert source.info.kind == "pipe"
        assert len(list(source)) == 30
    writer.join()
