"""`millpond watch --state`: a watch goes on where the one before it was, also after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from millpond.cli import app
from millpond.cli.state import Continued
from millpond.frames import Frame, Losses, SourceInfo
from millpond.snapshot.format import opened
from tests.cli.clips import write_clip
from tests.session.frames import moving


def watch(source: object, model: str, state: Path, *words: object) -> Result:
    options = ("--model", model, "--device", "cpu", "--max-new-tokens", 4, "--state", state)
    return CliRunner().invoke(app, [str(word) for word in ("watch", source, *options, *words)])


def usage(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])["usage"]
    return found


def contents(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a snapshot holds but for wall time and the most it ever held: plain values and payload."""
    with opened(path) as file:
        stream = file.session["stream"]
        first = min(entry.first for entry in file.entries.values())
    del stream["seconds"], stream["peak_bytes"]
    return stream, path.read_bytes()[first:]


def test_a_file_goes_on_at_the_time_reached(clip: Path, model: str, tmp_path: Path) -> None:
    """The clip is ten seconds long; the shorter one is its beginning."""
    begun = write_clip(tmp_path / "begun.mp4", frames=20, fps=4)
    state, events = tmp_path / "state", tmp_path / "events"
    words = ("--budget", "2MiB", "--json", "--ask-at", "2 early", "--ask-at", "7 late", "--events", events)
    first = watch(begun, model, state, *words[:-4])
    assert first.exit_code == 0, first.stderr
    assert usage(first)["frames_seen"] == 10
    second = watch(clip, model, state, *words, "--ask", "at the end")
    assert second.exit_code == 0, second.stderr
    assert "going on at 00:04.5" in second.stderr
    assert usage(second)["frames_seen"] == 20
    assert usage(second)["stream_seconds"] == 9.5
    asked = [answer["question"] for answer in json.loads(second.stdout.splitlines()[-1])["answers"]]
    assert asked == ["late", "at the end"]
    happened = [json.loads(line) for line in events.read_text().splitlines()]
    assert {"event": "resume", "stream_seconds": 4.5}.items() <= happened[1].items()
    third = watch(clip, model, state, "--json", "--ask", "again")
    assert third.exit_code == 0, third.stderr
    assert usage(third)["frames_seen"] == 20
    assert usage(third)["budget_bytes"] == 2 << 20
    smaller = watch(clip, model, state, "--json", "--budget", "1MiB")
    assert usage(smaller)["budget_bytes"] == 1 << 20


def test_another_session_than_the_saved_one_is_refused_in_one_line(clip: Path, model: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert watch(clip, model, state, "--budget", "2MiB").exit_code == 0
    before = state.read_bytes()
    for words, told in (
        (("--policy", "recent"), "with 'infinipot-v', not 'recent'"),
        (("--recent-frames", 2), "recent_frames 0, not 2"),
        (("--dtype", "bfloat16"), "dtype 'float32', and this model's is 'bfloat16'"),
    ):
        result = watch(clip, model, state, *words)
        assert result.exit_code == 1
        assert told in result.stderr.splitlines()[-1]
    state.write_bytes(before[:-9])
    result = watch(clip, model, state)
    assert result.exit_code == 1
    assert "is not a whole snapshot" in result.stderr
    assert watch(clip, model, tmp_path / "none" / "state").exit_code == 1


def test_a_state_that_cannot_be_saved_is_said_once_and_the_stream_goes_on(
    clip: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    state = tmp_path / "state"

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = watch(clip, model, state, "--state-every", 0, "--ask", "what", "--json")
    assert result.exit_code == 1
    assert result.stderr.count("No space left on device") == 1
    assert usage(result)["frames_seen"] == 20
    assert '"error": "cannot save to' in result.stdout
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "fsync", real)


@pytest.mark.slow
def test_after_kill_9_it_is_the_watch_that_was_never_killed(
    model: str, environment: dict[str, str], tmp_path: Path
) -> None:
    film = write_clip(tmp_path / "film.mp4", frames=160, fps=4)
    whole, state = tmp_path / "whole", tmp_path / "state"
    small = ("--budget", "300KiB", "--max-pixels", "3136")
    plain = watch(film, model, whole, *small)
    assert plain.exit_code == 0, plain.stderr
    words = ["watch", str(film), "--model", model, "--device", "cpu", *small, "--state", str(state)]
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", *words, "--state-every", "0"], env=environment | {"OMP_NUM_THREADS": "1"}
    )
    until = time.monotonic() + 120
    while not state.exists() or contents(state)[0]["frames"]["frames"] < 16:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = contents(state)[0]["frames"]["frames"]
    assert 16 <= reached < 80
    result = watch(film, model, state, *small)
    assert result.exit_code == 0, result.stderr
    assert "going on at" in result.stderr
    assert contents(state) == contents(whole)
    assert sorted(os.listdir(tmp_path)) == ["film.mp4", "state", "whole"]


class Camera:
    """A live source whose times begin at 0."""

    info = SourceInfo(name="camera", kind="url", live=True)
    dropped, losses = 3, Losses(lost=1)

    def __iter__(self) -> Iterator[Frame]:
        return moving(3, fps=4)

    def close(self) -> None:
        self.dropped = 4


def test_what_is_live_goes_on_from_the_time_reached() -> None:
    camera = Camera()
    source = Continued(camera, 20.0, 0.5)
    assert [frame.seconds for frame in source] == [20.5, 20.75, 21.0]
    assert (source.dropped, source.losses.lost, source.info.live) == (3, 1, True)
    source.close()
    assert source.dropped == 4
