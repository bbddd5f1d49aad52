"""Drawing frames of real pixels: the camera over a ground, clutter, objects, light and noise, all in integers.

A frame is a function of (seed, level, split, events, frame index), so frames can be drawn in any order, and a stream of any length takes
the memory of its grounds. Knows nothing about questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from millpond.eval.streams.digits import digit_mask
from millpond.eval.streams.video.assets import ground, ground_sources, picture
from millpond.eval.streams.video.events import TOKEN, VideoEvent
from millpond.eval.streams.video.levels import VideoLevel

_CLUTTER_FRAMES = 24
_LIGHT_FRAMES = 60
_CHALK = 245
_DRIFT = 3
"""Most pixels that an object drifts when the camera moves on."""


@dataclass(frozen=True)
class Placed:
    """An event's box in one frame: pixels (top, left) of its corner, before the camera's shake."""

    event: VideoEvent
    top: int
    left: int


def placed(event: VideoEvent, frame: int, edge: int) -> Placed:
    """Where the event's box is in that frame: moving ones go straight from quarter to quarter."""
    part, whole = event.progress(frame)
    corners = [(quarter // 2 * edge // 2, quarter % 2 * edge // 2) for quarter in event.quarters]
    (top, left), (bottom, right) = corners
    down, across = top + (bottom - top) * part // whole, left + (right - left) * part // whole
    return Placed(event, down + event.offset[0], across + event.offset[1])


class Camera:
    """What a camera sees of its grounds, from a seed.

    Args:
        seed: of everything random but the events.
        level, split: as of the stream.
        frames: length of the stream.
    """

    def __init__(self, seed: tuple[int, ...], level: VideoLevel, split: str, frames: int) -> None:
        self._seed, self._level = seed, level
        rng = np.random.default_rng([*seed, 0])
        self.sources = ground_sources(split)
        cuts = int(rng.integers(2 * frames // (level.ground_seconds * 2) + 1))
        self._cuts = np.sort(rng.integers(0, frames, cuts))
        # Clips as often as photographs, which are more.
        clips = [index for index, source in enumerate(self.sources) if source.file.endswith(".mp4")]
        stills = [index for index in range(len(self.sources)) if index not in clips]
        self._shots = [
            int(pool[int(rng.integers(len(pool)))])
            for pool in ((clips if rng.integers(2) else stills) for _ in range(cuts + 1))
        ]
        self._pace = int(rng.integers(1, 4))  # frames of the clip a frame of the stream
        self._waypoint_frames = int(rng.integers(30, 120))
        self._waypoint = lru_cache(maxsize=64)(self._draw_waypoint)
        self._clutter = lru_cache(maxsize=4)(self._draw_clutter)
        self._lamp = lru_cache(maxsize=4)(self._draw_lamp)

    def draw(self, frame: int, events: Iterable[VideoEvent]) -> NDArray[np.uint8]:
        """That frame with those events in it, uint8 [edge, edge, 3]."""
        level = self._level
        rng = np.random.default_rng([*self._seed, 1, frame])
        shake = rng.integers(-level.shake, level.shake + 1, 2)
        canvas = self._view(frame, shake)
        for pixels, opacity, at, speed, since in self._clutter(frame // _CLUTTER_FRAMES):
            place = at + speed * (frame - since) // 4 + shake
            _paste(canvas, pixels, opacity, int(place[0]), int(place[1]))
        for event in events:
            drift = np.clip((self._corner(event.start) - self._corner(frame)) >> 11, -_DRIFT, _DRIFT)
            self._place(canvas, event, frame, drift + shake)
        light = _between(self._lamp, frame, _LIGHT_FRAMES)
        canvas *= int(light[0])
        canvas >>= 8
        grain = rng.integers(-level.noise, level.noise + 1, canvas.shape[:2], dtype=np.int8)
        canvas += grain[..., None]
        return np.clip(canvas, 0, 255).astype(np.uint8)

    def _view(self, frame: int, shake: NDArray[np.int64]) -> NDArray[np.int32]:
        """The ground in view, between its pixels where the camera has zoomed in: int32 [edge, edge, 3]."""
        shot = int(np.searchsorted(self._cuts, frame, side="right"))
        pixels = ground(self.sources[self._shots[shot]])
        at = frame * self._pace % max(1, 2 * len(pixels) - 2)  # there and back again
        still = pixels[min(at, max(0, 2 * len(pixels) - 2 - at))]
        *corner, side = (int(value) for value in _between(self._waypoint, frame, self._waypoint_frames))
        edge = self._level.edge
        side = min(side, (min(still.shape[:2]) - 2) << 8)
        axes = []
        for place, jolt, length in zip(corner, shake, still.shape[:2], strict=True):
            room = ((length - 1) << 8) - side
            # The way of the camera is folded back at the ground's border.
            start = place % max(1, 2 * room)
            start = min(start, 2 * room - start) if room else 0
            start = min(max(start - int(jolt) * side // edge, 0), room)
            axes.append(start + np.arange(edge) * side // edge)
        (y, x) = axes
        rows, columns = y >> 8, x >> 8
        down, across = (y & 255)[:, None, None], (x & 255)[None, :, None]
        source = still.astype(np.int32)
        lines = source[rows] * (256 - down) + source[rows + 1] * down
        view: NDArray[np.int32] = (lines[:, columns] * (256 - across) + lines[:, columns + 1] * across) >> 16
        return view

    def _corner(self, frame: int) -> NDArray[np.int64]:
        return _between(self._waypoint, frame, self._waypoint_frames)[:2]

    def _draw_waypoint(self, index: int) -> NDArray[np.int64]:
        """The camera's corner and the side of what it sees, in 1/256 ground pixels, int64 [3]."""
        rng = np.random.default_rng([*self._seed, 2, index])
        low, high = self._level.zoom
        pan = rng.integers(0, (self._level.pan_pixels << 8) + 1, 2)
        return np.append(pan + (20 << 8), rng.integers(low << 8, (high << 8) + 1))

    def _draw_lamp(self, index: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([*self._seed, 3, index])
        return 256 + rng.integers(-self._level.light, self._level.light + 1, 1)

    def _draw_clutter(
        self, window: int
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], int]]:
        """Unnamed things cut out of other grounds, each in one shape or another, that wander through this window."""
        rng = np.random.default_rng([*self._seed, 4, window])
        things = []
        if rng.integers(100) < self._level.clutter:
            for _ in range(int(rng.integers(1, 4))):
                pixels = ground(self.sources[int(rng.integers(len(self.sources)))])
                still = pixels[int(rng.integers(len(pixels)))]
                height, width = rng.integers(6, 20, 2) * self._level.edge // 64
                top, left = rng.integers(still.shape[0] - height), rng.integers(still.shape[1] - width)
                cut = still[top : top + height, left : left + width].astype(np.int32)
                y, x = np.ogrid[:height, :width]
                power = int(rng.integers(1, 4))  # rhombus, ellipse, almost a rectangle
                far = abs(2 * y - height + 1) ** power * width**power + abs(2 * x - width + 1) ** power * height**power
                opacity = np.where(far <= (height * width) ** power, 255, 0).astype(np.int32)[..., None]
                at, speed = rng.integers(0, self._level.edge, 2), rng.integers(-8, 9, 2)
                things.append((cut * opacity, opacity, at, speed, window * _CLUTTER_FRAMES))
        return [(pixels // 255, opacity, at, speed, since) for pixels, opacity, at, speed, since in things]

    def _place(self, canvas: NDArray[np.int32], event: VideoEvent, frame: int, shift: NDArray[np.int64]) -> None:
        box = placed(event, frame, self._level.edge)
        top, left = box.top + int(shift[0]), box.left + int(shift[1])
        height, width = (tokens * TOKEN - 2 for tokens in event.size)
        colours, opacity = picture(event.object.picture, height, width)
        if event.into is not None:
            part, whole = event.progress(frame)
            later, covered = picture(event.into.picture, height, width)
            colours = (colours * (whole - part) + later * part) // whole
            opacity = (opacity * (whole - part) + covered * part) // whole
        _paste(canvas, colours, opacity, top + 1, left + 1)
        if event.beside is not None:
            _paste(canvas, *picture(event.beside.picture, height, width), top + 1, left + event.size[1] * TOKEN + 1)
        for index, image in enumerate(event.number):
            stroke = (digit_mask(image) * 255).astype(np.int32)[..., None]
            # On a dark plate, so that chalk can be read on any ground.
            plate = np.broadcast_to(_CHALK * stroke // 255 + 30 * (255 - stroke) // 255, (*stroke.shape[:2], 3))
            _paste(canvas, plate, np.full_like(stroke, 255), top + event.size[0] * TOKEN, left + index * TOKEN)


def _paste(
    canvas: NDArray[np.int32], colours: NDArray[np.int32], opacity: NDArray[np.int32], top: int, left: int
) -> None:
    """Lay pixels (colours times opacity, 0..255) over the canvas; what lies outside is cut off."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + colours.shape[0], canvas.shape[0]), min(left + colours.shape[1], canvas.shape[1])
    if y1 <= y0 or x1 <= x0:
        return
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas[y0:y1, x0:x1]
    under *= 255 - opacity[inside]
    under += 127
    under //= 255
    under += colours[inside]


def _between(points: object, frame: int, step: int) -> NDArray[np.int64]:
    """The value at that frame of a polyline with a random point every `step` frames, in integers."""
    index, part = divmod(frame, step)
    here, there = points(index), points(index + 1)  # type: ignore[operator]
    result: NDArray[np.int64] = here + (there - here) * part // step
    return result
