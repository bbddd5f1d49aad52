"""StreamingVLM's layout, told by hand and by brute force."""

from dataclasses import replace

import pytest
import torch

from millpond import PolicyError, policies
from millpond.policies.base import TEXT, View
from tests.policies.views import grid_view

SECOND = 1_000_000


def stream(kinds: str) -> View:
    """One token a second: `v` vision, `t` text; the last is protected."""
    count = len(kinds)
    view = grid_view(count, 1, 1, recent=1)
    grid_position = view.grid_position.clone()
    grid_position[:, [i for i, kind in enumerate(kinds) if kind == "t"]] = TEXT
    return replace(view, time_us=(torch.arange(count) * SECOND).repeat(2, 1), grid_position=grid_position)


def layout(kinds: str, slots: int, sink: int, window: int, seconds: int) -> list[int]:
    """The rule in lists of positions."""
    text = [i for i, kind in enumerate(kinds) if kind == "t"]
    vision = [i for i, kind in enumerate(kinds) if kind == "v" and i > len(kinds) - 1 - seconds]
    first, latest = text[:sink], text[sink:][-window:] if window else []
    wanted = len(first) + len(latest) + len(vision)
    if wanted > slots:
        first = first[: len(first) * slots // wanted]
        cut = len(latest) * slots // wanted
        latest = latest[-cut:] if cut else []
        vision = vision[len(vision) - (slots - len(first) - len(latest)) :]
    kept = {*first, *latest, *vision}
    others = [i for i in range(len(kinds)) if i not in kept]
    kept |= set(others[len(others) - (slots - len(kept)) :])
    return sorted(kept)


@pytest.mark.parametrize("slots", [3, 5, 8, 12, 20, 30])
@pytest.mark.parametrize(("sink", "window", "seconds"), [(4, 4, 8), (0, 4, 8), (2, 0, 16), (512, 512, 16), (1, 2, 1)])
def test_the_layout_and_how_it_shrinks(slots: int, sink: int, window: int, seconds: int) -> None:
    kinds = "vvttttttvvvvttttvvvvvvtttttvvvvtv"
    policy = policies.get("streaming-vlm", text_sink=sink, text_window=window, vision_seconds=seconds)
    keep = policy.keep(stream(kinds), slots)
    expected = layout(kinds, slots, sink, window, seconds)
    assert keep[0].tolist() == keep[1].tolist() == expected


def test_without_text_it_is_the_latest_vision() -> None:
    view = grid_view(40, 2, 2, recent=1)  # two frames a second
    assert policies.get("streaming-vlm").keep(view, 100)[0].tolist() == list(range(60, 160))


def test_its_parameters_are_the_published_ones_and_bad_ones_are_refused() -> None:
    assert policies.get("streaming-vlm") == policies.read(
        "streaming-vlm:text_sink=512:text_window=512:vision_seconds=16.0"
    )
    for bad in ({"text_sink": -1}, {"text_window": 2.5}, {"vision_seconds": 0}, {"vision_seconds": "long"}):
        with pytest.raises(PolicyError, match="streaming-vlm"):
            policies.get("streaming-vlm", **bad)


def test_more_room_than_the_layout_needs_shrinks_nothing() -> None:
    kinds = "t" * 8 + "v" * 30
    keep = policies.get("streaming-vlm", text_sink=0, text_window=4, vision_seconds=4).keep(stream(kinds), 12)
    assert keep[0].tolist() == layout(kinds, 12, 0, 4, 4) == [4, 5, 6, 7, *range(30, 38)]
