"""How much of what makes video hard to remember; chances are in percent, so that all that is drawn at random is an integer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoLevel:
    """One level.

    Attributes:
        edge: of a frame in pixels; 64 is 16 tokens a group of two frames, 128 is 64 tokens, at 16 pixels a token.
        events_a_minute: events that are tried; those that find no room are left out. Half a second (one frame) to `longest_seconds` long.
        together: most events that show at once (each in a quarter of its own).
        sizes: heights and widths of objects in tokens.
        digits: least and most digits of a number under an object.
        shake: most pixels that the camera shakes; pan_pixels: most ground pixels that it moves between two waypoints.
        zoom: least and most side of the ground, in ground pixels, that a frame shows.
        ground_seconds: mean time until the ground changes (a cut).
        light: most that the light drifts, in 1/256.
        clutter: chance that novel, unnamed things wander through twelve seconds.
        lookalikes: chance that an object that comes back is another picture of the same name.
        moves, changes, pairs, numbers: chance that an event's object moves to another quarter, turns slowly into another, has a
            second part beside it, has a number under it.
        noise: most grey levels of sensor noise.
    """

    edge: int = 64
    events_a_minute: int = 8
    together: int = 2
    longest_seconds: int = 60
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (2, 2))
    digits: tuple[int, int] = (1, 2)
    shake: int = 1
    pan_pixels: int = 24
    zoom: tuple[int, int] = (72, 110)
    ground_seconds: int = 120
    light: int = 30
    clutter: int = 30
    lookalikes: int = 50
    moves: int = 20
    changes: int = 12
    pairs: int = 20
    numbers: int = 20
    noise: int = 4


VIDEO_LEVELS = {
    "video": VideoLevel(),
    "video-hard": VideoLevel(
        events_a_minute=14,
        together=3,
        longest_seconds=180,
        shake=3,
        pan_pixels=60,
        zoom=(48, 120),
        ground_seconds=40,
        light=60,
        clutter=80,
        lookalikes=80,
        noise=10,
    ),
    "video-fine": VideoLevel(
        edge=128,
        events_a_minute=12,
        together=3,
        longest_seconds=120,
        sizes=((1, 1), (2, 2), (2, 3), (3, 2)),
        digits=(2, 4),
        shake=2,
        pan_pixels=40,
        clutter=60,
        noise=6,
    ),
}
"""By name. `video` and `video-hard` have 16 tokens a group, `video-fine` 64."""
