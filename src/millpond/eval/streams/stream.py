"""A stream: scene, events and questions from one seed; frames drawn lazily, or written as a real MP4 with a JSON beside it.

Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.eval.streams.digits import digit_value
from millpond.eval.streams.drawing import DIGIT, Scene, level_named
from millpond.eval.streams.events import Event, plan
from millpond.eval.streams.questions import Question, questions_of
from millpond.eval.streams.splits import FPS, FRAMES_A_GROUP, SPLITS


@dataclass(frozen=True)
class Stream:
    """One generated stream.

    Attributes:
        seed, groups, level, split: what it was made from; the same four give the same stream.
        events: what happens, in order of start; `start` counts groups, which last one second.
        questions: one of each type that has one with a single answer.
    """

    seed: int
    groups: int
    level: str
    split: str
    events: tuple[Event, ...]
    questions: tuple[Question, ...]

    @property
    def seconds(self) -> float:
        return self.groups * FRAMES_A_GROUP / FPS

    def frames(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Frames as they come: (seconds, uint8 [64, 64, 3]), two a second, drawn when taken."""
        count = self.groups * FRAMES_A_GROUP
        scene = Scene((SPLITS[self.split], self.seed, 1), level_named(self.level), count)
        for index in range(count):
            group = index // FRAMES_A_GROUP
            sights = [sight for event in self.events if (sight := event.sight(group)) is not None]
            yield index / FPS, scene.draw(index, sights)

    def write(self, path: str | Path, *, crf: int = 23) -> Path:
        """Write PATH as MP4 (H.264) and, beside it, the events, questions and answers as JSON; return the JSON's path.

        Raises:
            SourceError: the file cannot be written.
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
                "colour": event.colour_name,
                "digit": digit_value(event.image) if event.kind == DIGIT else None,
                "start_seconds": event.start * FRAMES_A_GROUP / FPS,
                "stop_seconds": event.stop * FRAMES_A_GROUP / FPS,
                "cells": list(event.cells),
            }
            for event in self.events
        ]
        made = {"seed": self.seed, "groups": self.groups, "level": self.level, "split": self.split, "fps": FPS}
        return {**made, "events": events, "questions": [asdict(question) for question in self.questions]}


def generate(seed: int, *, groups: int = 64, level: str = "standard", split: str = "test") -> Stream:
    """The stream of that seed.

    Args:
        seed: 0 or more; seeds of different splits never give the same stream.
        groups: length in temporal groups of two frames (seconds), at least 4.
        level: a key of LEVELS.
        split: a key of SPLITS; tune on "train" and "validation", measure on "test".

    Raises:
        SourceError: a number or name out of range.
    """
    if seed < 0:
        raise SourceError(f"a seed must be 0 or more, not {seed}")
    if groups < 4:
        raise SourceError(f"a stream needs at least 4 groups, not {groups}")
    if split not in SPLITS:
        raise SourceError(f"no split is called {split!r}; there are: {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS[split], seed, 0])
    events = plan(rng, groups, level_named(level), split)
    return Stream(seed, groups, level, split, events, questions_of(rng, events, groups))
