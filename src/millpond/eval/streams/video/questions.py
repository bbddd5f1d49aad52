"""Questions about streams of real pixels, each with exactly one right answer of one word by what has shown when it is asked.

Knows events, nothing about pixels or models. A question about a whole event is asked when the event is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from millpond.eval.streams.questions import Question
from millpond.eval.streams.video.assets import names
from millpond.eval.streams.video.events import QUARTERS, VideoEvent

COUNTS = ("once", "twice", "3", "4")
THIRDS = ("early", "middle", "late")
_FRAMES_A_SECOND = 2
_ONE_IN = {("now", "nothing"): 8, ("count", "once"): 4}
"""What would be the answer too often, where it is the only one that can be had, is asked for once in so many times."""


@dataclass(frozen=True)
class VideoQuestion(Question):
    """A question asked in the middle or at the end of a stream.

    Attributes:
        evidence: spans of frames (first, one past the last); who has seen a frame of each can know the answer. None where the answer
            rests on all that was shown so far.
    """

    evidence: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class _Draft:
    text: str
    answer: str
    event: VideoEvent | None
    evidence: tuple[tuple[int, int], ...] | None
    earlier: tuple[str, str] | None = None


class _Past:
    """What has shown before frame `now`: whole events, and those that still show."""

    def __init__(self, events: Sequence[VideoEvent], now: int) -> None:
        self.now = now
        self.events = [event for event in events if event.start < now]
        self.times = Counter(event.name for event in self.events)
        self.over = [event for event in self.events if event.stop <= now]
        self.once = [event for event in self.events if self.times[event.name] == 1]
        self.once_over = [event for event in self.over if self.times[event.name] == 1]
        self.shown = {*self.times} | {
            look.name for event in self.events for look in (event.into, event.beside) if look is not None
        }


def _span(event: VideoEvent) -> tuple[tuple[int, int], ...]:
    return ((event.start, event.stop),)


def _where(past: _Past) -> list[_Draft]:
    return [_Draft(f"Where was the {e.name}?", QUARTERS[e.quarters[0]], e, _span(e)) for e in past.once if not e.moves]


def _went(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"Where did the {e.name} go?", QUARTERS[e.quarters[1]], e, ((e.stop - 1, e.stop),))
        for e in past.once_over
        if e.moves
    ]


def _number(past: _Past) -> list[_Draft]:
    return [_Draft(f"What number was under the {e.name}?", e.number_text, e, _span(e)) for e in past.once if e.number]


def _beside(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"What came together with the {e.name}?", e.beside.name, e, _span(e))
        for e in past.once
        if e.beside is not None
    ]


def _changed(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"What did the {e.name} change into?", e.into.name, e, ((e.start, e.start + 1), (e.stop - 1, e.stop)))
        for e in past.once_over
        if e.into is not None
    ]


def _appear(past: _Past) -> list[_Draft]:
    yes = [_Draft(f"Did a picture of a {e.name} appear?", "yes", e, _span(e)) for e in past.once]
    no = [_Draft(f"Did a picture of a {name} appear?", "no", None, None) for name in names() if name not in past.shown]
    return yes + no


def _first(past: _Past) -> list[_Draft]:
    return [_Draft("What appeared first?", e.name, e, _span(e)) for e in past.events[:1] if e.beside is None]


def _last(past: _Past) -> list[_Draft]:
    return [_Draft("What appeared last?", e.name, e, _span(e)) for e in past.events[-1:] if e.beside is None]


def _neighbours(past: _Past) -> list[tuple[VideoEvent, VideoEvent]]:
    return list(zip(past.events, past.events[1:], strict=False))


def _before(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"What appeared before the {b.name}?", a.name, a, _span(a) + _span(b))
        for a, b in _neighbours(past)
        if past.times[b.name] == 1 and a.beside is None
    ]


def _after(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"What appeared after the {a.name}?", b.name, b, _span(a) + _span(b))
        for a, b in _neighbours(past)
        if past.times[a.name] == 1 and b.beside is None
    ]


def _count(past: _Past) -> list[_Draft]:
    last = {event.name: event for event in past.events}
    return [
        _Draft(f"How many times did a {name} appear?", COUNTS[count - 1], last[name], None)
        for name, count in past.times.items()
        if count <= len(COUNTS)
    ]


def _when(past: _Past) -> list[_Draft]:
    return [
        _Draft(f"When did the {e.name} appear?", THIRDS[e.start * 3 // past.now], e, ((e.start, e.start + 1),))
        for e in past.once
    ]


def ago_answer(frames: int) -> str:
    """Seconds since an event began, down to a power of two: 1, 2, 4, 8 ..."""
    return str(1 << max(0, (frames // _FRAMES_A_SECOND).bit_length() - 1))


def _ago(past: _Past) -> list[_Draft]:
    return [
        _Draft(
            f"How many seconds ago did the {e.name} appear, down to a power of two?",
            ago_answer(past.now - e.start),
            e,
            ((e.start, e.start + 1),),
        )
        for e in past.once
        if past.now - e.start >= _FRAMES_A_SECOND
    ]


def _now(past: _Past) -> list[_Draft]:
    showing = [event for event in past.events if event.stop >= past.now]
    if len(showing) > 1 or any(event.beside or event.into for event in showing):
        return []
    seen = ((past.now - 1, past.now),)
    return [_Draft("What is there now?", showing[0].name if showing else "nothing", None, seen)]


def _then(past: _Past) -> list[_Draft]:
    """Where was what the turn before has named?"""
    return [
        _Draft("Where was it?", QUARTERS[d.event.quarters[0]], d.event, d.evidence, (d.text, d.answer))
        for d in _after(past)
        if d.event is not None and not d.event.moves
    ]


VIDEO_QUESTION_TYPES: dict[str, Callable[[_Past], list[_Draft]]] = {
    "where": _where,
    "went": _went,
    "number": _number,
    "beside": _beside,
    "changed": _changed,
    "appear": _appear,
    "first": _first,
    "last": _last,
    "before": _before,
    "after": _after,
    "count": _count,
    "when": _when,
    "ago": _ago,
    "now": _now,
    "then": _then,
}
"""Every question type, by name; each function drafts all questions of its type that have one answer."""


def ask(rng: np.random.Generator, events: Sequence[VideoEvent], now: int, kind: str) -> VideoQuestion | None:
    """One question of that type asked behind frame `now` - 1, or None where there is none with a single answer.

    An answer is picked first, each as likely as any, then a question that has it: so no answer is common because its events are.
    """
    drafts = VIDEO_QUESTION_TYPES[kind](_Past(events, now))
    if not drafts:
        return None
    answers = sorted({draft.answer for draft in drafts})
    if len(answers) == 1 and rng.integers(_ONE_IN.get((kind, answers[0]), 1)):
        return None
    answer = answers[int(rng.integers(len(answers)))]
    having = [draft for draft in drafts if draft.answer == answer]
    draft = having[int(rng.integers(len(having)))]
    began = None if draft.event is None else draft.event.start / _FRAMES_A_SECOND
    return VideoQuestion(
        kind, draft.text, draft.answer, began, now / _FRAMES_A_SECOND, draft.earlier, evidence=draft.evidence
    )


def questions_of(rng: np.random.Generator, events: Sequence[VideoEvent], frames: int) -> tuple[VideoQuestion, ...]:
    """Of each type one question at the end and one in mid-stream, where there is one; in the order in which they are asked."""
    asked = []
    for kind in VIDEO_QUESTION_TYPES:
        # On a whole second, so that a model which takes two frames at a time has seen all of them.
        middle = 2 * int(rng.integers(frames // 8, frames // 2))
        asked += [question for now in (middle, frames) if (question := ask(rng, events, now, kind)) is not None]
    return tuple(sorted(asked, key=lambda question: question.ask_seconds))
