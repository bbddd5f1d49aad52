"""KeyDiff and InfiniteVGGT against the formulas written out in float64."""

from dataclasses import replace

import pytest
import torch

from millpond import policies
from millpond.policies.base import View
from tests.policies.views import grid_view, joined, thinned, with_text


def cosines(keys: torch.Tensor) -> list[float]:
    """cos(k, mean of the unit keys), one by one."""
    units = [key / key.norm() for key in keys.double()]
    mean = sum(units, torch.zeros(keys.shape[1], dtype=torch.float64)) / len(units)
    return [float(unit @ mean / mean.norm()) for unit in units]


def chosen(scores: list[float], protected: list[bool], slots: int) -> list[int]:
    """The protected and the best of the others."""
    order = sorted(range(len(scores)), key=lambda i: (not protected[i], -scores[i]))
    return sorted(order[:slots])


def first_frame_end(view: View, head: int) -> int:
    """Tokens up to the end of the first frame."""
    frames = [i for i in range(view.tokens) if int(view.grid_position[head, i, 0]) != -1]
    first = int(view.time_us[head, frames[0]])
    return max(i for i in range(view.tokens) if int(view.time_us[head, i]) <= first) + 1


VIEWS = [
    grid_view(6, 2, 3, recent=2, seed=1),
    grid_view(9, 1, 1, recent=1, seed=2, chunk=4),
    with_text(grid_view(8, 3, 3, recent=2, heads=3, seed=3)),
    joined(grid_view(5, 2, 3, seed=4), grid_view(4, 4, 2, recent=1, seed=5)),
    grid_view(8, 3, 4, recent=1, seed=6, width=32, chunk=100),
]


@pytest.mark.parametrize("view", VIEWS)
def test_keydiff_keeps_what_the_formula_says(view: View) -> None:
    for passes in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("keydiff").keep(view, slots)
        for head in range(view.heads):
            scores = [-cos for cos in cosines(view.keys[head])]
            assert keep[head].tolist() == chosen(scores, view.protected[head].tolist(), slots), passes
        view = thinned(view, keep, 1)


@pytest.mark.parametrize("view", VIEWS)
def test_infinite_vggt_scores_the_candidates_behind_its_anchor(view: View) -> None:
    anchors = [view.keys[head, : first_frame_end(view, head)] for head in range(view.heads)]
    for _ in range(2):
        slots = view.tokens * 2 // 3
        keep = policies.get("infinite-vggt").keep(view, slots)
        for head in range(view.heads):
            anchor = first_frame_end(view, head)
            assert torch.equal(view.keys[head, :anchor], anchors[head])  # it never moved
            scores = [2.0] * anchor + [-cos for cos in cosines(view.keys[head, anchor:])]
            assert keep[head].tolist() == chosen(scores, view.protected[head].tolist(), slots)
        view = thinned(view, keep, 1)


def test_the_anchor_yields_to_what_is_protected_from_its_end() -> None:
    view = grid_view(3, 2, 3, recent=2)
    assert policies.get("infinite-vggt").keep(view, 15)[0].tolist() == [0, 1, 2, *range(6, 18)]


def test_a_key_alone_in_its_direction_stays() -> None:
    view = grid_view(10, 2, 2, recent=1)
    keys = view.keys.clone()
    keys[:] = torch.eye(8)[0] + 0.01 * keys
    keys[:, 17] = -torch.eye(8)[0]
    for name in ("keydiff", "infinite-vggt"):
        assert (policies.get(name).keep(replace(view, keys=keys), 10) == 17).any(dim=1).all()
