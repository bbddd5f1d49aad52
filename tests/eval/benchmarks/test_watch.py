"""One pass over a video: every question at its time, of the frames before it and of no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from millpond import frames, models
from millpond.errors import BudgetError
from millpond.eval.benchmarks import watch as watching
from millpond.eval.benchmarks.base import Query, Video
from millpond.eval.benchmarks.settings import LAST_FRAMES, Arm, Settings, arms
from millpond.eval.benchmarks.watch import Pass, watch
from millpond.models.base import Family
from tests.eval.benchmarks.published import clip

SETTINGS = Settings(
    benchmark="ovo-bench",
    questions="",
    model="minnow",
    weights="",
    dtype="float32",
    budget=1 << 20,
    host_budget=None,
    fps=2.0,
    max_frames=None,
    max_pixels=None,
    positions="contiguous",
    recent_frames=0,
    reserve_tokens=64,
    versions={},
)
POLICY, LAST, FULL = Arm("infinipot-v", True), Arm(LAST_FRAMES), Arm("full")


@pytest.fixture(scope="module")
def family() -> Family:
    return models.load("minnow", device="cpu")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("film") / "a.mp4", seconds=6)


def video(path: Path, *moments: float | None, **more: Any) -> Video:
    return Video("a", path, tuple(Query(f"q{at}", "What is on screen?", "t", at, **more) for at in moments))


def replies(found: Pass) -> dict[str, float]:
    return {reply.query: reply.at_seconds for reply in found.replies}


@pytest.mark.parametrize("arm", [POLICY, LAST, FULL], ids=lambda arm: arm.name)
def test_a_question_is_asked_of_the_frames_before_its_time(
    family: Family, film: Path, arm: Arm, monkeypatch: Any
) -> None:
    opened: list[Any] = []
    real = frames.open
    monkeypatch.setattr(frames, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    found = watch(family, video(film, 0, 2, 2.2, 4, 60, None), arm, SETTINGS)
    # At 0 s there is only the frame that begins then; at 60 s the film is over.
    assert replies(found) == {"q0": 0.0, "q2": 1.5, "q2.2": 2.0, "q4": 3.5, "q60": 5.5, "qNone": 5.5}
    assert (found.frames, found.seconds, found.broken, found.refused) == (12, 5.5, None, None)
    assert sum(path[0] == film for path in opened) == 1
    assert found.peak_bytes <= (found.budget_bytes or found.peak_bytes)


def test_asking_does_not_change_what_comes_after(family: Family, film: Path) -> None:
    alone = watch(family, video(film, None), POLICY, SETTINGS)
    among = watch(family, video(film, 1, 3, None), POLICY, SETTINGS)
    assert among.replies[-1] == alone.replies[-1]


def test_frames_are_taken_as_asked_and_fewer_of_a_long_video(family: Family, film: Path) -> None:
    slow = watch(family, video(film, None), POLICY, replace(SETTINGS, fps=1.0))
    assert (slow.frames, slow.seconds) == (6, 5.0)
    few = watch(family, video(film, None), POLICY, replace(SETTINGS, max_frames=3))
    assert few.frames == 3
    assert watch(family, video(film, None), POLICY, replace(SETTINGS, max_frames=100)).frames == 12


def test_without_a_memory_the_model_sees_four_frames(family: Family, film: Path, monkeypatch: Any) -> None:
    fed: list[int] = []
    real = watching.Session.feed
    monkeypatch.setattr(watching.Session, "feed", lambda self, source: fed.append(real(self, source)) or fed[-1])
    found = watch(family, video(film, 1, 4, None), LAST, SETTINGS)
    assert fed == [2, 4, 4]
    assert found.budget_bytes is None
    assert found.frames == 12


def test_a_question_may_hang_on_a_yes(family: Family, film: Path, monkeypatch: Any) -> None:
    queries = (Query("poll 1", "now", "t", 1), Query("say 1", "what", "t", 1, after_yes="poll 1"))
    queries += (Query("poll 2", "now", "t", 2), Query("say 2", "what", "t", 2, after_yes="poll 2"))
    texts = iter(["No.", "Yes!", "3"])
    real = watching.Session.ask
    monkeypatch.setattr(watching.Session, "ask", lambda *a, **k: replace(real(*a, **k), text=next(texts)))
    found = watch(family, Video("a", film, queries), POLICY, SETTINGS)
    assert [(reply.query, reply.text) for reply in found.replies] == [
        ("poll 1", "No."),
        ("poll 2", "Yes!"),
        ("say 2", "3"),
    ]


def test_a_video_that_breaks_off_keeps_what_was_asked_before(family: Family, tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mp4", seconds=8).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    found = watch(family, video(tmp_path / "cut.mp4", 1, 2, 7, None), POLICY, SETTINGS)
    assert replies(found) == {"q1": 0.5, "q2": 1.5}
    assert found.broken
    assert not found.whole
    (tmp_path / "none.mp4").write_bytes(b"not a film")
    nothing = watch(family, video(tmp_path / "none.mp4", 1), POLICY, SETTINGS)
    assert nothing.replies == ()
    assert "none.mp4" in str(nothing.broken)


def test_what_forgets_nothing_is_left_out_where_it_does_not_fit(family: Family, film: Path, monkeypatch: Any) -> None:
    def little(size: int, device: Any = None) -> None:
        # Twelve frames of 64 x 64 are six groups of 16 tokens.
        assert size == 6 * 16 * family.geometry.kv_bytes_per_token
        raise BudgetError("more than there is")

    monkeypatch.setattr(watching, "check_memory", little)
    found = watch(family, video(film, 1), FULL, SETTINGS)
    assert (found.replies, found.refused, found.whole) == ((), "more than there is", False)
    assert watch(family, video(film, 1), POLICY, SETTINGS).whole
    assert watch(family, video(film, 1), LAST, SETTINGS).whole


def test_a_device_that_is_full_leaves_out_what_has_no_cap_and_stops_what_has(
    family: Family, film: Path, monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(watching.Session, "feed", full)
    assert watch(family, video(film, 1), FULL, SETTINGS).refused == "out of memory on cpu"
    with pytest.raises(BudgetError, match="no memory left for infinipot-v on a"):
        watch(family, video(film, 1), POLICY, SETTINGS)


def test_a_budget_too_small_is_an_error(family: Family, film: Path) -> None:
    with pytest.raises(BudgetError, match="the minimum that works"):
        watch(family, video(film, 1), POLICY, replace(SETTINGS, budget=10_000))


def test_the_baselines_are_always_there_once() -> None:
    assert [arm.name for arm in arms(["keydiff"])] == ["full", LAST_FRAMES, "uniform", "recent", "keydiff"]
    chosen = arms(["uniform", "keydiff", "keydiff"])
    assert [(arm.name, arm.asked) for arm in chosen] == [
        ("full", False),
        (LAST_FRAMES, False),
        ("recent", False),
        ("uniform", True),
        ("keydiff", True),
    ]
    # Recent frames shown again and host memory are for what was asked, the budget for all that has a cap.
    settings = replace(SETTINGS, recent_frames=4, host_budget=1 << 20)
    configs = {arm.name: arm.config(settings) for arm in arms(["keydiff", "rekv"])}
    assert {name: config.recent_frames for name, config in configs.items() if config.recent_frames} == {
        "keydiff": 4,
        "rekv": 4,
    }
    assert [name for name, config in configs.items() if config.host_budget] == ["rekv"]
    assert [name for name, config in configs.items() if config.budget is None] == ["full", LAST_FRAMES]
