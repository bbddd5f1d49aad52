"""The live line and the summary say what the usage says."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from millpond.answer import Usage
from millpond.cli.live import LiveLine, summary

USAGE = Usage(
    budget_bytes=2 * 2**20,
    live_bytes=3 * 2**19,
    allocated_bytes=2_000_000,
    peak_bytes=2_050_000,
    full_cache_bytes=64 * 2**20,
    frames_seen=731,
    frames_dropped=17,
    frames_skipped=5,
    frames_reduced=0,
    timestamps_kept=40,
    memory_tokens=1234,
    stream_tokens=99_999,
    evicted_tokens=98_765,
    compactions=21,
    reanchorings=0,
    stream_seconds=365.5,
    seconds_source=1.0,
    seconds_vision=2.0,
    seconds_decoder=3.0,
    seconds_compaction=0.5,
    seconds_answers=0.5,
    seconds_total=10.0,
)


def test_the_summary() -> None:
    text = summary(USAGE)
    for part in (
        "06:05.5",
        "731 frames",
        "17 dropped",
        "5 not let in",
        "73.1 frame/s",
        "1.50 MiB",
        "cap 2.00 MiB",
        "64.00 MiB",
        "98765",
    ):
        assert part in text
    assert "no cap" in summary(replace(USAGE, budget_bytes=None))
    assert "frame/s" not in summary(replace(USAGE, frames_seen=0, seconds_total=0.0))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a person would see on stderr."""
    screen = io.StringIO()

    def console(**_: object) -> Console:
        return Console(file=screen, force_terminal=True, width=120)

    monkeypatch.setattr("millpond.cli.live.Console", console)
    return screen


def test_the_line_shows_frames_time_bytes_and_evictions(terminal: io.StringIO) -> None:
    with LiveLine(lambda: USAGE, shown=True) as line:
        line.tick()
        line.clear()
        seen = terminal.getvalue()
    for part in ("06:05.5", "731 frames", "17 dropped", "frame/s", "1.50 MiB of 2.00 MiB", "98765 forgotten"):
        assert part in seen


def test_it_asks_for_numbers_only_now_and_then(terminal: io.StringIO) -> None:
    asked = []

    def usage() -> Usage:
        asked.append(None)
        return USAGE

    with LiveLine(usage, shown=True) as line:
        for _ in range(50):
            line.tick()
    assert len(asked) < 50


def test_hidden_it_draws_and_asks_nothing(terminal: io.StringIO) -> None:
    def usage() -> Usage:
        raise AssertionError("nobody sees it")

    with LiveLine(usage, shown=False) as line:
        line.tick()
    assert terminal.getvalue() == ""
