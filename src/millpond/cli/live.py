"""The line that shows a stream coming in: frames, frame/s, stream time, bytes of the cap, evictions.

On stderr, and only where a person sees it. Knows how to draw numbers, not where they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from millpond.memory.budget import format_bytes

if TYPE_CHECKING:
    from millpond.answer import Usage
    from millpond.frames import Losses

# Often enough to look alive; reading a session's usage walks its kept times, which is not free.
_REFRESH_SECONDS = 0.25


def clock(seconds: float) -> str:
    """`3725.5` as `"1:02:05.5"`, `65.5` as `"01:05.5"`."""
    tenths = int(seconds * 10 + 1e-6)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}:{minutes:02d}" if hours else f"{minutes:02d}"
    return f"{head}:{rest // 10:02d}.{rest % 10}"


def summary(usage: Usage, losses: Losses | None = None) -> str:
    """What a watch came to, in two lines; a third where the source was lost."""
    spent = usage.seconds_total
    rate = f" ({usage.frames_seen / spent:.1f} frame/s)" if spent > 0 and usage.frames_seen else ""
    dropped = f", {usage.frames_dropped} dropped" if usage.frames_dropped else ""
    skipped = f", {usage.frames_skipped} not let in" if usage.frames_skipped else ""
    host = f"; {usage.host_frames} frame groups in host memory" if usage.host_budget_bytes else ""
    cap = "no cap" if usage.budget_bytes is None else f"cap {format_bytes(usage.budget_bytes)}"
    gone = ""
    if losses is not None and losses.lost:
        gone = (
            f"\nthe source was lost {losses.lost} times and came back {losses.back} times, in {losses.retries} attempts; "
            f"{losses.seconds:.1f} s without it"
        )
    return (
        f"watched {clock(usage.stream_seconds)}: {usage.frames_seen} frames{dropped}{skipped} in {spent:.1f} s{rate}\n"
        f"memory {format_bytes(usage.live_bytes)}, peak {format_bytes(usage.peak_bytes)}, {cap}; a full cache would take "
        f"{format_bytes(usage.full_cache_bytes)}; {usage.memory_tokens} tokens remembered, {usage.evicted_tokens} "
        f"forgotten in {usage.compactions} compactions{host}{gone}"
    )


class LiveLine:
    """Draws itself over and over in one line while it is entered and `shown`.

    Args:
        usage: asked for the numbers, at most four times a second.
        state: what is the matter with the source, if anything.
        shown: False draws nothing (quiet, not a terminal, or a prompt has the terminal).
    """

    def __init__(self, usage: Callable[[], Usage], *, shown: bool, state: Callable[[], str] = str) -> None:
        self._usage, self._state = usage, state
        self._console = Console(stderr=True)
        self._shown = shown and self._console.is_terminal
        self._live: Live | None = None
        self._drawn = 0.0
        self._last = (monotonic(), 0)

    def __enter__(self) -> LiveLine:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the line away, so that something else can be printed; `tick` brings it back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tick(self) -> None:
        """Draw anew when it is time to."""
        now = monotonic()
        if not self._shown or now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        usage = self._usage()
        if self._live is None:
            self._start()
        if self._live is not None:
            self._live.update(Text(self._line(usage, now), no_wrap=True, overflow="ellipsis"), refresh=True)

    def _start(self) -> None:
        if self._shown:
            # stdout carries results and may be a file: it is none of this line's business.
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()

    def _line(self, usage: Usage, now: float) -> str:
        before, frames = self._last
        rate = (usage.frames_seen - frames) / max(now - before, 1e-6)
        if now - before > 2:
            self._last = (now, usage.frames_seen)
        cap = "" if usage.budget_bytes is None else f" of {format_bytes(usage.budget_bytes)}"
        dropped = f"  {usage.frames_dropped} dropped" if usage.frames_dropped else ""
        state = self._state()
        return (
            f"{clock(usage.stream_seconds)}  {state}{'  ' if state else ''}{usage.frames_seen} frames{dropped}  {rate:.1f} frame/s  "
            f"{format_bytes(usage.live_bytes)}{cap}  {usage.evicted_tokens} forgotten"
        )
