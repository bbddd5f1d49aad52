"""A stream of any level, drawn or of real pixels, by the level's name."""

from __future__ import annotations

from millpond.errors import SourceError
from millpond.eval.streams.drawing import LEVELS
from millpond.eval.streams.stream import Stream, generate
from millpond.eval.streams.video import VIDEO_LEVELS, VideoStream, generate_video


def generate_any(seed: int, *, groups: int = 64, level: str = "standard", split: str = "test") -> Stream | VideoStream:
    """As `generate` for a key of LEVELS, as `generate_video` for a key of VIDEO_LEVELS.

    Raises:
        SourceError: a number or name out of range.
    """
    if level in VIDEO_LEVELS:
        return generate_video(seed, groups=groups, level=level, split=split)
    if level not in LEVELS:
        raise SourceError(f"no level is called {level!r}; there are: {', '.join([*LEVELS, *VIDEO_LEVELS])}")
    return generate(seed, groups=groups, level=level, split=split)
