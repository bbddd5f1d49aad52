"""A stream of real pixels: events and questions from one seed, frames drawn lazily. Knows nothing about models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.eval.streams.splits import FPS, FRAMES_A_GROUP, SPLITS
from millpond.eval.streams.video.drawing import Camera
from millpond.eval.streams.video.events import QUARTERS, VideoEvent, plan
from millpond.eval.streams.video.levels import VIDEO_LEVELS
from millpond.eval.streams.video.questions import VideoQuestion, questions_of

_THIS_KIND = 14
"""Keeps the random numbers apart from those of drawn streams."""


@dataclass(frozen=True)
class VideoStream:
    """One stream of real pixels.

    Attributes:
        seed, groups, level, split: what it was made from; the same four give the same stream.
        events: what happens, in order of start, in frames of half a second.
        questions: in the order in which they are to be asked; `ask_seconds` says when.
    """

    seed: int
    groups: int
    level: str
    split: str
    events: tuple[VideoEvent, ...]
    questions: tuple[VideoQuestion, ...]

    @property
    def seconds(self) -> float:
        return self.groups * FRAMES_A_GROUP / FPS

    @property
    def frame_count(self) -> int:
        return self.groups * FRAMES_A_GROUP

    def showing(self, frame: int) -> list[VideoEvent]:
        """The events that show in that frame."""
        return [event for event in self.events if event.start <= frame < event.stop]

    def frames(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Frames as they come: (seconds, uint8 [edge, edge, 3]), two a second, drawn when taken.

        Raises:
            SourceError: a package of the extra `streams` is missing, or ships other pixels.
        """
        camera = Camera(
            (SPLITS[self.split], self.seed, _THIS_KIND, 1), VIDEO_LEVELS[self.level], self.split, self.frame_count
        )
        for frame in range(self.frame_count):
            yield frame / FPS, camera.draw(frame, self.showing(frame))

    def write(self, path: str | Path, *, crf: int = 23) -> Path:
        """Write PATH as MP4 (H.264) and, beside it, the events, questions and answers as JSON; return the JSON's path.

        Raises:
            SourceError: the file cannot be written, or as for `frames`.
        """
        from millpond.frames import write_mp4

        path = Path(path)
        write_mp4(path, self.frames(), FPS, crf=crf)
        beside = path.with_suffix(".json")
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return beside

    def to_dict(self) -> dict[str, object]:
        """What the JSON holds: made of plain numbers and names."""
        events = [
            {
                "object": event.name,
                "start_seconds": event.start / FPS,
                "stop_seconds": event.stop / FPS,
                "quarters": [QUARTERS[quarter] for quarter in event.quarters],
                "box": list(event.box),
                "into": event.into.name if event.into else None,
                "beside": event.beside.name if event.beside else None,
                "number": event.number_text or None,
            }
            for event in self.events
        ]
        made = {"seed": self.seed, "groups": self.groups, "level": self.level, "split": self.split, "fps": FPS}
        return {**made, "events": events, "questions": [asdict(question) for question in self.questions]}


def generate_video(seed: int, *, groups: int = 64, level: str = "video", split: str = "test") -> VideoStream:
    """The stream of that seed.

    Args:
        seed: 0 or more; seeds of different splits never give the same stream.
        groups: length in temporal groups of two frames (seconds), at least 8.
        level: a key of VIDEO_LEVELS.
        split: "train", "validation" or "test"; they share no ground, no picture and no digit image.

    Raises:
        SourceError: a number or name out of range.
    """
    if seed < 0:
        raise SourceError(f"a seed must be 0 or more, not {seed}")
    if groups < 8:
        raise SourceError(f"a stream of real pixels needs at least 8 groups, not {groups}")
    if level not in VIDEO_LEVELS:
        raise SourceError(f"no level of real pixels is called {level!r}; there are: {', '.join(VIDEO_LEVELS)}")
    if split not in SPLITS:
        raise SourceError(f"no split is called {split!r}; there are: {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS[split], seed, _THIS_KIND, 0])
    events = plan(rng, groups, VIDEO_LEVELS[level], split)
    return VideoStream(seed, groups, level, split, events, questions_of(rng, events, groups * FRAMES_A_GROUP))
