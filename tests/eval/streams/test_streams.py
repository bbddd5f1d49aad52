"""Streams: the same seed gives the same pixels, answers follow from events, splits share nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.errors import SourceError
from millpond.eval.streams import FPS, LEVELS, QUESTION_TYPES, SPLITS, generate
from millpond.eval.streams.digits import digit_indices, digit_value
from millpond.eval.streams.drawing import DIGIT, OBJECTS, Scene, Sight

seeds = st.integers(0, 10_000)
levels = st.sampled_from(sorted(LEVELS))
lengths = st.integers(4, 96)


@settings(max_examples=60, deadline=None)
@given(seeds, levels, lengths)
def test_events_lie_inside_the_stream_in_order_and_do_not_collide(seed: int, level: str, groups: int) -> None:
    events = generate(seed, groups=groups, level=level).events
    assert len(events) >= 2
    starts, stops = [e.start for e in events], [e.stop for e in events]
    assert starts == sorted(set(starts))
    assert stops == sorted(set(stops))
    assert starts[0] >= 0
    assert stops[-1] <= groups
    for group in range(groups):
        cells = [s.cell for e in events if (s := e.sight(group)) is not None]
        assert len(cells) == len(set(cells))


def test_an_object_waits_when_another_has_wandered_over_the_whole_frame() -> None:
    events = generate(15479, level="hard").events  # no cell was free for an overlapping object
    assert any(len(set(event.cells)) > 8 for event in events)
    assert all(a.stop < b.stop for a, b in pairwise(events))


@settings(max_examples=60, deadline=None)
@given(seeds, levels, lengths)
def test_one_colour_per_object_and_no_immediate_repeat(seed: int, level: str, groups: int) -> None:
    events = generate(seed, groups=groups, level=level).events
    looks = {(e.kind, e.colour, e.image) for e in events}
    assert len(looks) == len({e.kind for e in events})
    assert all(a.kind != b.kind for a, b in pairwise(events))


@settings(max_examples=60, deadline=None)
@given(seeds, levels, lengths)
def test_answers_agree_with_a_brute_force_reading_of_the_groups(seed: int, level: str, groups: int) -> None:
    stream = generate(seed, groups=groups, level=level)
    shown = [[s for e in stream.events if (s := e.sight(group)) is not None] for group in range(groups)]
    kinds = {OBJECTS[s.kind] for sights in shown for s in sights}
    for question in stream.questions:
        last_word = question.text.rstrip("?").split()[-1]
        if question.type == "appear":
            assert (question.answer == "yes") == (question.text.split()[2] in kinds)
        if question.type == "first":
            assert question.answer == next(OBJECTS[sights[0].kind] for sights in shown if sights)
        if question.type == "now":
            assert [OBJECTS[s.kind] for s in shown[-1]] == ([] if question.answer == "nothing" else [question.answer])
        if question.type == "where":
            cells = {s.cell for sights in shown for s in sights if OBJECTS[s.kind] == last_word}
            (cell,) = cells
            down, right = cell // 4 >= 2, cell % 4 >= 2
            assert question.answer == f"{'bottom' if down else 'top'}-{'right' if right else 'left'}"
        if question.type == "digit":
            (image,) = {s.image for sights in shown for s in sights if s.kind == DIGIT}
            assert question.answer == str(digit_value(image))


def test_every_type_is_asked_and_seconds_are_those_of_the_stream() -> None:
    asked = {q.type: q for seed in range(30) for q in generate(seed, level="hard").questions}
    assert set(asked) == set(QUESTION_TYPES)
    assert all(q.ask_seconds == 64.0 for q in asked.values())
    assert all(q.event_seconds is None or 0 <= q.event_seconds < 64 for q in asked.values())
    assert asked["then"].earlier is not None


def test_yes_and_no_are_about_as_frequent() -> None:
    answers = [q.answer for seed in range(300) for q in generate(seed).questions if q.type == "appear"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(level: str) -> None:
    once, again, other = (np.stack([p for _, p in generate(s, groups=6, level=level).frames()]) for s in (5, 5, 6))
    assert once.shape == (12, 64, 64, 3)
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_splits_share_no_stream_and_no_digit_image() -> None:
    streams = [generate(3, split=split) for split in SPLITS]
    assert len({stream.events for stream in streams}) == 3
    images = [set(digit_indices(split).tolist()) for split in SPLITS]
    assert sum(map(len, images)) == len(set().union(*images)) == 1797
    for stream, allowed in zip(streams, images, strict=True):
        assert all(e.image in allowed for e in stream.events if e.kind == DIGIT)


def test_frames_come_lazily_from_streams_of_any_length() -> None:
    stream = generate(1, groups=100_000)
    frames = stream.frames()
    assert [next(frames)[0] for _ in range(3)] == [0.0, 0.5, 1.0]
    assert stream.seconds == 100_000


def test_an_object_changes_the_pixels_of_its_cell_and_no_others() -> None:
    scene = Scene(1, LEVELS["plain"], 10)
    empty, drawn = scene.draw(0, []), scene.draw(0, [Sight(kind=1, colour=0, cell=5)])
    changed = np.argwhere((empty != drawn).any(-1))
    assert changed.min() >= 16
    assert changed.max() < 32
    assert len(changed) > 100


def test_written_mp4_and_json_hold_the_stream(tmp_path: Path) -> None:
    stream = generate(2, groups=5)
    beside = stream.write(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert [time for time, _ in decoded] == pytest.approx([i / FPS for i in range(10)], abs=1e-4)
    for (_, got), (_, drawn) in zip(decoded, stream.frames(), strict=True):
        assert np.abs(got.astype(int) - drawn).mean() < 12
    told = json.loads(beside.read_text())
    assert told["seed"] == 2
    assert [q["answer"] for q in told["questions"]] == [q.answer for q in stream.questions]
    assert len(told["events"]) == len(stream.events)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": -1}, "seed"), ({"groups": 3}, "at least 4"), ({"level": "x"}, "plain"), ({"split": "x"}, "validation")],
)
def test_what_cannot_be_made_is_refused_with_what_can(change: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        generate(**{"seed": 0, **change})  # type: ignore[arg-type]
