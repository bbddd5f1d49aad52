"""Drawing: a scene with its ground, light, camera and distractors, and the objects that show in it.

Frames are 64 x 64 pixels, RGB. Objects are about 14 pixels wide and stand in one of 4 x 4 cells of 16 pixels, off its middle by up to 2
pixels. Everything in a frame is a function of (scene seed, frame index, what is visible), so frames can be drawn in any
order. Knows nothing about time lines or questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.eval.streams.digits import digit_mask

EDGE = 64
CELLS = 16
"""Cells of a frame, 4 x 4 in raster order."""
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (60, 210, 220),
}
OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "bar", "digit")
DIGIT = OBJECTS.index("digit")
_RGB = np.array([*COLOURS.values()], dtype=np.float32)
_CHALK = np.array((240, 240, 235), dtype=np.float32)


@dataclass(frozen=True)
class Level:
    """How much of what makes streams difficult; probabilities are per stream.

    Attributes:
        noise: standard deviation of sensor noise, in grey levels.
        flicker, clutter, shake, pan, drift, cuts: probability of a flickering strip, of grey things that wander about, of a shaking
            camera (1 px), of a slow pan (2 px), of drifting light (20 %), of scene cuts.
        repeats, moves, overlaps: probability per event that it comes back, moves from cell to cell, or overlaps its predecessor.
        events: least and most different objects in 64 groups.
    """

    noise: float = 2.0
    flicker: float = 0.0
    clutter: float = 0.0
    shake: float = 0.0
    pan: float = 0.0
    drift: float = 0.0
    cuts: float = 0.0
    repeats: float = 0.0
    moves: float = 0.0
    overlaps: float = 0.0
    events: tuple[int, int] = (3, 6)


LEVELS = {
    "plain": Level(),
    "standard": Level(4.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1, (4, 8)),
    "hard": Level(8.0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.25, 0.25, 0.3, (6, 9)),
}


def level_named(name: str) -> Level:
    """The level of that name.

    Raises:
        SourceError: there is none.
    """
    if name not in LEVELS:
        raise SourceError(f"no difficulty level is called {name!r}; there are: {', '.join(LEVELS)}")
    return LEVELS[name]


@dataclass(frozen=True)
class Sight:
    """One object as it shows in one frame: index into OBJECTS, index into COLOURS, cell, image of the digit, offset in pixels."""

    kind: int
    colour: int
    cell: int
    image: int = -1
    offset: tuple[int, int] = (0, 0)


@cache
def _mask(kind: int) -> NDArray[np.float32]:
    """Opacity of a drawn object, float32 [16, 16], from 8 x 8 samples a pixel."""
    axis = (np.arange(128) + 0.5) / 8 - 8
    y, x = np.meshgrid(axis, axis, indexing="ij")
    r, angle = np.hypot(x, y), np.arctan2(x, -y)
    name = OBJECTS[kind]
    inside = {
        "circle": r < 7,
        "square": np.maximum(abs(x), abs(y)) < 6.2,
        "triangle": (y < 6) & (2 * abs(x) < y + 7.5),
        "star": r < 3.6 + 3.8 * np.abs(((angle * 5 / (2 * np.pi)) % 1) - 0.5) ** 1.2 * 2.4,
        "cross": ((abs(x) < 2) | (abs(y) < 2)) & (np.maximum(abs(x), abs(y)) < 7),
        "ring": (r < 7.2) & (r > 4),
        "diamond": abs(x) * 1.4 + abs(y) < 7.5,
        "bar": (abs(y) < 2) & (abs(x) < 7.5),
    }[name]
    opacity: NDArray[np.float32] = inside.reshape(16, 8, 16, 8).mean((1, 3)).astype(np.float32)
    return opacity


class Scene:
    """A camera's view, reproducible from a seed.

    Args:
        seed: of everything random in the scene.
        level: what may distract.
        frames: length of the stream in frames; pan, drift and cuts stretch over it.
    """

    def __init__(self, seed: int | tuple[int, ...], level: Level, frames: int) -> None:
        self._seed = seed if isinstance(seed, tuple) else (seed,)
        self._level = level
        rng = np.random.default_rng([*self._seed, 0])
        self._frames = max(frames, 1)
        has = {
            name: rng.random() < getattr(level, name)
            for name in ("flicker", "clutter", "shake", "pan", "drift", "cuts")
        }
        cuts = rng.integers(1, 4) if has["cuts"] else 0
        self._cuts = np.sort(rng.integers(0, self._frames, cuts))
        self._grounds = [_ground(rng) for _ in range(cuts + 1)]
        self._shake, self._drift = has["shake"], has["drift"]
        self._pan = rng.uniform(-2, 2, 2) if has["pan"] else np.zeros(2)
        self._phase = rng.uniform(0, 2 * np.pi)
        self._periods = rng.uniform(0.5, 3)
        self._strip: tuple[slice, slice] | None = None
        if has["flicker"]:
            top, left = rng.integers(0, EDGE - 10, 2)
            across = rng.random() < 0.5
            self._strip = (slice(top, top + 6), slice(0, EDGE)) if across else (slice(0, EDGE), slice(left, left + 6))
        count = rng.integers(2, 6) if has["clutter"] else 0
        self._things = rng.uniform(0, EDGE, (count, 2))
        self._speeds = rng.uniform(-1.5, 1.5, (count, 2))
        self._greys = rng.uniform(40, 190, count)
        self._sizes = rng.integers(3, 7, count)

    def draw(self, index: int, sights: Iterable[Sight]) -> NDArray[np.uint8]:
        """Frame `index` with those objects in it, uint8 [64, 64, 3]."""
        rng = np.random.default_rng([*self._seed, 1, index])
        share = index / self._frames
        shift = np.round(self._pan * share)
        if self._shake:
            shift += rng.integers(-1, 2, 2)
        dy, dx = int(shift[0]), int(shift[1])
        ground = self._grounds[int(np.searchsorted(self._cuts, index, side="right"))]
        canvas = ground[4 + dy : 4 + dy + EDGE, 4 + dx : 4 + dx + EDGE].copy()
        for place, speed, grey, size in zip(self._things, self._speeds, self._greys, self._sizes, strict=True):
            y, x = ((place + speed * index) % (EDGE - size)).astype(int)
            canvas[y : y + size, x : x + size] = grey
        if self._strip is not None:
            canvas[self._strip] = rng.uniform(20, 220)
        for sight in sights:
            self._place(canvas, sight, dy, dx)
        light = 1.0
        if self._drift:
            light += 0.2 * np.sin(self._phase + 2 * np.pi * self._periods * share)
        canvas *= np.float32(light)
        canvas += rng.standard_normal((EDGE, EDGE, 1), dtype=np.float32) * np.float32(self._level.noise)
        return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)

    @staticmethod
    def _place(canvas: NDArray[np.float32], sight: Sight, dy: int, dx: int) -> None:
        digit = sight.kind == DIGIT
        mask = digit_mask(sight.image) if digit else _mask(sight.kind)
        top = sight.cell // 4 * 16 + sight.offset[0] - dy
        left = sight.cell % 4 * 16 + sight.offset[1] - dx
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + 16, EDGE), min(left + 16, EDGE)
        part = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
        colour = _CHALK if digit else _RGB[sight.colour]
        canvas[y0:y1, x0:x1] += part * (colour - canvas[y0:y1, x0:x1])


def _ground(rng: np.random.Generator) -> NDArray[np.float32]:
    """A dull, blotchy ground, float32 [72, 72, 3]: a margin of 4 px for the camera to move in."""
    coarse = rng.uniform(-14, 14, (9, 9, 1)) + rng.uniform(-5, 5, (9, 9, 3))
    grain = rng.uniform(-3, 3, (72, 72, 1))
    ground: NDArray[np.float32] = (rng.uniform(50, 110) + np.kron(coarse, np.ones((8, 8, 1))) + grain).astype(
        np.float32
    )
    return ground
