"""The frame-by-frame table of what shows, and answers read off it: a second way to every answer, which shares no code with the first.

Knows the table and a question's words; not how questions are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from millpond.eval.streams.splits import FPS
from millpond.eval.streams.video.drawing import placed
from millpond.eval.streams.video.events import QUARTERS
from millpond.eval.streams.video.levels import VIDEO_LEVELS
from millpond.eval.streams.video.questions import VideoQuestion
from millpond.eval.streams.video.stream import VideoStream

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sight:
    """One thing in one frame: which appearance it belongs to, its name, its quarter as seen (None between two), its digits, its role."""

    track: int
    name: str
    quarter: str | None
    number: str
    role: str


def table(stream: VideoStream, until: int) -> list[list[Sight]]:
    """What shows in each frame before `until`, as placed in the picture; role is "object", "part" or "into"."""
    half = VIDEO_LEVELS[stream.level].edge // 2
    frames: list[list[Sight]] = [[] for _ in range(until)]
    for track, event in enumerate(stream.events):
        for frame in range(event.start, min(event.stop, until)):
            box, (height, width) = placed(event, frame, 2 * half), event.box
            down, across = (
                {box.top // half, (box.top + height - 1) // half},
                {
                    box.left // half,
                    (box.left + width - 1) // half,
                },
            )
            whole = len(down) == len(across) == 1
            quarter = QUARTERS[down.pop() * 2 + across.pop()] if whole else None
            part, length = event.progress(frame)
            if event.into is None or part < length:
                frames[frame].append(Sight(track, event.name, quarter, event.number_text, "object"))
            if event.into is not None and part > 0:
                frames[frame].append(Sight(track, event.into.name, quarter, "", "into"))
            if event.beside is not None:
                frames[frame].append(Sight(track, event.beside.name, quarter, "", "part"))
    return frames


def derived(stream: VideoStream, question: VideoQuestion) -> str | None:
    """The answer that the table gives; None where it gives none or several."""
    now = round(question.ask_seconds * FPS)
    frames = table(stream, now)
    seen = [(at, sight) for at, sights in enumerate(frames) for sight in sights]
    firsts = {sight.track: at for at, sight in reversed(seen)}
    order = [track for track, _ in sorted(firsts.items(), key=lambda pair: pair[1])]

    def named(track: int) -> str | None:
        return _only(s.name for _, s in seen if s.track == track and s.role != "into")

    def quarters(track: int) -> list[str]:
        held = [s.quarter for _, s in seen if s.track == track and s.role == "object" and s.quarter]
        return [quarter for quarter, _ in groupby(held)]

    def track_of(name: str) -> int | None:
        return _only(s.track for _, s in seen if s.name == name and s.role == "object")

    text = question.text if question.earlier is None else question.earlier[0]
    asked = re.search(r"(?:the|a) (\w+?)(?: appear| go| change|,|\?)", text)
    name = asked.group(1) if asked else ""
    track = track_of(name)
    kind = question.type
    if kind == "appear":
        return "yes" if any(sight.name == name for _, sight in seen) else "no"
    if kind in {"first", "last"}:
        return named(order[0 if kind == "first" else -1])
    if kind == "now":
        return _only(s.name for s in frames[-1]) if frames[-1] else "nothing"
    if kind == "count":
        times = len({s.track for _, s in seen if s.name == name and s.role == "object"})
        return {1: "once", 2: "twice"}.get(times, str(times))
    if track is None:
        return None
    if kind in {"before", "after", "then"}:
        at = order.index(track) + (-1 if kind == "before" else 1)
        if not 0 <= at < len(order):
            return None
        return named(order[at]) if kind != "then" else _only(quarters(order[at]))
    if kind == "where":
        return _only(quarters(track))
    if kind == "went":
        return quarters(track)[-1] if len(quarters(track)) > 1 else None
    if kind == "number":
        return _only(s.number for _, s in seen if s.track == track and s.role == "object")
    if kind in {"beside", "changed"}:
        return _only(s.name for _, s in seen if s.track == track and s.role == ("part" if kind == "beside" else "into"))
    if kind == "when":
        third = next(index for index in range(3) if firsts[track] * 3 < now * (index + 1))
        return ("early", "middle", "late")[third]
    seconds = (now - firsts[track]) / FPS
    return str(max(2**power for power in range(20) if 2**power <= seconds))


def _only(values: Iterable[_T]) -> _T | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None
