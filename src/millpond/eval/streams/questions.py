"""Questions about a time line, with answers of one word. Knows nothing about pixels or models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from millpond.eval.streams.digits import digit_value
from millpond.eval.streams.drawing import DIGIT, OBJECTS
from millpond.eval.streams.events import Event

_COUNTS = ("once", "twice", "3")


@dataclass(frozen=True)
class Question:
    """One question about a stream.

    Attributes:
        type: a key of QUESTION_TYPES.
        text, answer: as asked, and the one right word.
        event_seconds: when the latest event that the answer rests on began; None where it rests on none.
        ask_seconds: when to ask: the end of the last frame.
        earlier: (question, answer) of the turn before, for questions that refer to it.
    """

    type: str
    text: str
    answer: str
    event_seconds: float | None
    ask_seconds: float
    earlier: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Draft:
    text: str
    answer: str
    event: Event | None
    earlier: tuple[str, str] | None = None


def _once(events: Sequence[Event]) -> list[Event]:
    """Events of objects that appear a single time."""
    times = Counter(event.kind for event in events)
    return [event for event in events if times[event.kind] == 1]


def _still(events: Sequence[Event]) -> list[Event]:
    return [event for event in _once(events) if len(set(event.cells)) == 1]


def _place(event: Event) -> str:
    row, col = divmod(event.cells[0], 4)
    return f"{'top' if row < 2 else 'bottom'}-{'left' if col < 2 else 'right'}"


def _looks(events: Sequence[Event]) -> list[Event]:
    """The first event of each object, in order."""
    return list({event.kind: event for event in reversed(events)}.values())[::-1]


def _colour(events: Sequence[Event], groups: int) -> list[_Draft]:
    return [_Draft(f"What colour was the {e.name}?", str(e.colour_name), e) for e in _looks(events) if e.kind != DIGIT]


def _object(events: Sequence[Event], groups: int) -> list[_Draft]:
    looks = [event for event in _looks(events) if event.kind != DIGIT]
    times = Counter(event.colour for event in looks)
    return [_Draft(f"Which object was {e.colour_name}?", e.name, e) for e in looks if times[e.colour] == 1]


def _where(events: Sequence[Event], groups: int) -> list[_Draft]:
    return [_Draft(f"Where was the {e.name}?", _place(e), e) for e in _still(events)]


def _appear(events: Sequence[Event], groups: int) -> list[_Draft]:
    shown = _looks(events)
    kinds = {event.kind for event in shown}
    absent = [kind for kind in range(len(OBJECTS)) if kind not in kinds]
    yes = [_Draft(f"Did a {event.name} appear?", "yes", event) for event in shown]
    no = [_Draft(f"Did a {OBJECTS[kind]} appear?", "no", None) for kind in absent]
    count = min(len(yes), len(no))  # as many of either, so that guessing is worth one half
    return [draft for pair in zip(yes[:count], no[:count], strict=True) for draft in pair]


def _digit(events: Sequence[Event], groups: int) -> list[_Draft]:
    return [_Draft("Which digit was shown?", str(digit_value(e.image)), e) for e in _looks(events) if e.kind == DIGIT]


def _first(events: Sequence[Event], groups: int) -> list[_Draft]:
    return [_Draft("Which object appeared first?", events[0].name, events[0])]


def _last(events: Sequence[Event], groups: int) -> list[_Draft]:
    return [_Draft("Which object appeared last?", events[-1].name, events[-1])]


def _before(events: Sequence[Event], groups: int) -> list[_Draft]:
    single = {id(event) for event in _once(events)}
    pairs = pairwise(events)
    return [_Draft(f"Which object appeared before the {b.name}?", a.name, a) for a, b in pairs if id(b) in single]


def _after(events: Sequence[Event], groups: int) -> list[_Draft]:
    single = {id(event) for event in _once(events)}
    pairs = pairwise(events)
    return [_Draft(f"Which object appeared after the {a.name}?", b.name, b) for a, b in pairs if id(a) in single]


def _count(events: Sequence[Event], groups: int) -> list[_Draft]:
    times = Counter(event.kind for event in events)
    last = {event.kind: event for event in events}
    return [
        _Draft(f"How many times did the {OBJECTS[kind]} appear?", _COUNTS[count - 1], last[kind])
        for kind, count in times.items()
        if count <= len(_COUNTS)
    ]


def _now(events: Sequence[Event], groups: int) -> list[_Draft]:
    shown = [event for event in events if event.sight(groups - 1)]
    if len(shown) > 1:
        return []
    return [_Draft("Which object is there now?", shown[0].name if shown else "nothing", shown[0] if shown else None)]


def _when(events: Sequence[Event], groups: int) -> list[_Draft]:
    names = ("early", "middle", "late")
    return [_Draft(f"When did the {e.name} appear?", names[e.start * 3 // groups], e) for e in _once(events)]


def _then(events: Sequence[Event], groups: int) -> list[_Draft]:
    still = {id(event) for event in _still(events)}
    return [
        _Draft("Where was it?", _place(d.event), d.event, (d.text, d.answer))
        for d in _object(events, groups)
        if d.event and id(d.event) in still
    ]


QUESTION_TYPES: dict[str, Callable[[Sequence[Event], int], list[_Draft]]] = {
    "colour": _colour,
    "object": _object,
    "where": _where,
    "appear": _appear,
    "digit": _digit,
    "first": _first,
    "last": _last,
    "before": _before,
    "after": _after,
    "count": _count,
    "now": _now,
    "when": _when,
    "then": _then,
}
"""Every question type, by name; each function drafts all questions of its type that a time line has one answer to."""


def ask(
    rng: np.random.Generator, events: Sequence[Event], groups: int, kind: str, seconds_a_group: float = 1.0
) -> Question | None:
    """One question of the type `kind`, picked at random; None where the time line has none with a single answer."""
    drafts = QUESTION_TYPES[kind](events, groups)
    if not drafts:
        return None
    draft = drafts[int(rng.integers(len(drafts)))]
    began = None if draft.event is None else draft.event.start * seconds_a_group
    return Question(kind, draft.text, draft.answer, began, groups * seconds_a_group, draft.earlier)


def questions_of(rng: np.random.Generator, events: Sequence[Event], groups: int) -> tuple[Question, ...]:
    """One question of each type that has one."""
    return tuple(question for kind in QUESTION_TYPES if (question := ask(rng, events, groups, kind)) is not None)
