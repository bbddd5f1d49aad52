"""What happens in a stream of real pixels: which named things show where and when. Draws nothing and asks nothing.

Time counts frames of half a second. An event's object has a quarter of the frame to itself while it shows (two where it moves), so nothing
hides anything. Names have roles in a stream: some show in one event only, some come back, some are only ever a second part or
what something turns into, and the others never show; that is what gives questions a single answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millpond.eval.streams.digits import digit_indices, digit_value
from millpond.eval.streams.video.assets import names, picture_codes
from millpond.eval.streams.video.levels import VideoLevel

TOKEN = 16
"""Pixels of a token's edge."""
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
_COMPANIONS, _SINGLES, _BACK = 12, 20, 10


@dataclass(frozen=True)
class Look:
    """A picture of a named thing."""

    name: str
    picture: str


@dataclass(frozen=True)
class VideoEvent:
    """One object's appearance.

    Attributes:
        object: what shows, as it first looks.
        size: height and width in tokens.
        start, stop: first frame in which it shows, and one past the last.
        quarters: indices into QUARTERS: where it begins and where it ends.
        offset: pixels (down, right) of its box from the corner of its quarter.
        into: what it has turned into by its last frame, or None.
        beside: the second part at its right, or None.
        number: indices of the handwritten digits under it, left to right.
    """

    object: Look
    size: tuple[int, int]
    start: int
    stop: int
    quarters: tuple[int, int]
    offset: tuple[int, int]
    into: Look | None = None
    beside: Look | None = None
    number: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.object.name

    @property
    def moves(self) -> bool:
        return self.quarters[0] != self.quarters[1]

    @property
    def number_text(self) -> str:
        return "".join(str(digit_value(image)) for image in self.number)

    @property
    def box(self) -> tuple[int, int]:
        """Height and width in pixels of everything that belongs to it."""
        return box_of(self.size, self.beside is not None, len(self.number))

    def progress(self, frame: int) -> tuple[int, int]:
        """How far it has come in that frame, as (part, whole): of its way, or of what it turns into."""
        return frame - self.start, max(1, self.stop - 1 - self.start)


def box_of(size: tuple[int, int], pair: bool, digits: int) -> tuple[int, int]:
    """Height and width in pixels of an object of that size in tokens with its second part and its number."""
    width = size[1] * (2 if pair else 1)
    return (size[0] + (digits > 0)) * TOKEN, max(width, digits) * TOKEN


def plan(rng: np.random.Generator, groups: int, level: VideoLevel, split: str) -> tuple[VideoEvent, ...]:
    """Events of a stream of `groups` seconds, in order of start; no two start in the same frame."""
    frames = groups * 2
    count = max(4, groups * level.events_a_minute // 60)
    starts = np.sort(rng.permutation(frames - 1)[:count])
    deck = [names()[int(at)] for at in rng.permutation(len(names()))]
    companions, deck = deck[:_COMPANIONS], deck[_COMPANIONS:]
    singles, back = deck[: min(_SINGLES, 1 + count // 2)], deck[_SINGLES : _SINGLES + min(_BACK, max(2, count // 4))]
    once = {int(at): name for at, name in zip(rng.permutation(count), singles, strict=False)}
    known: dict[str, str] = {}
    events: list[VideoEvent] = []

    def look(name: str) -> Look:
        if name not in known or rng.integers(100) < level.lookalikes:
            codes = picture_codes(name, split)
            known[name] = codes[int(rng.integers(len(codes)))]
        return Look(name, known[name])

    for index, start in enumerate(map(int, starts)):
        showing = [event for event in events if event.stop > start]
        taken = {quarter for event in showing for quarter in event.quarters}
        free = [int(quarter) for quarter in rng.permutation(4) if quarter not in taken]
        active = {event.name for event in showing}
        again = [name for name in back if name not in active]
        if len(showing) >= level.together or not free or (index not in once and not again):
            continue
        name = once[index] if index in once else again[int(rng.integers(len(again)))]
        stop = min(frames, start + _length(rng, min(level.longest_seconds * 2, max(2, frames // 6))))
        size, traits = _traits(rng, level, long=stop - start >= 4, room=len(free) > 1)
        extra = look(companions[int(rng.integers(_COMPANIONS))]) if traits & {"changes", "pairs"} else None
        images = digit_indices(split)
        digits = int(rng.integers(level.digits[0], level.digits[1] + 1)) if "numbers" in traits else 0
        height, width = box_of(size, "pairs" in traits, digits)
        events.append(
            VideoEvent(
                look(name),
                size,
                start,
                stop,
                (free[0], free[1] if "moves" in traits else free[0]),
                (int(rng.integers(level.edge // 2 - height + 1)), int(rng.integers(level.edge // 2 - width + 1))),
                into=extra if "changes" in traits else None,
                beside=extra if "pairs" in traits else None,
                number=tuple(int(images[int(at)]) for at in rng.integers(len(images), size=digits)),
            )
        )
    return tuple(events)


def _length(rng: np.random.Generator, longest: int) -> int:
    """Frames an event lasts: as many events of one frame as of some, and of many."""
    scale = 1 << int(rng.integers(longest.bit_length()))
    return min(longest, scale + int(rng.integers(scale)))


def _traits(rng: np.random.Generator, level: VideoLevel, *, long: bool, room: bool) -> tuple[tuple[int, int], set[str]]:
    """Size in tokens, and at most one of what an event may do; it does not move or change in less than two seconds."""
    chances = [("moves", level.moves), ("changes", level.changes), ("pairs", level.pairs), ("numbers", level.numbers)]
    dice, trait = int(rng.integers(100)), ""
    for name, chance in chances:
        if 0 <= dice < chance:
            trait = name
        dice -= chance
    if (trait in {"moves", "changes"} and not long) or (trait == "moves" and not room):
        trait = ""
    fits = [
        size
        for size in level.sizes
        if max(box_of(size, trait == "pairs", level.digits[1] if trait == "numbers" else 0)) <= level.edge // 2
    ]
    return fits[int(rng.integers(len(fits)))], {trait} - {""}
