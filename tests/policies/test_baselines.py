"""The blind baselines: what each keeps, told by hand or by brute force."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from millpond import policies
from millpond.policies.methods.uniform import _spread
from tests.policies.views import grid_view, thinned


def test_recent_keeps_the_sink_and_the_window() -> None:
    view = grid_view(10, 2, 2, recent=1)
    assert policies.get("recent").keep(view, 12)[0].tolist() == [0, 1, 2, 3, *range(32, 40)]
    assert policies.get("recent", sink=0).keep(view, 12)[0].tolist() == list(range(28, 40))
    assert policies.get("recent").keep(view, 5)[1].tolist() == [0, *range(36, 40)]  # protection comes before the sink


def test_uniform_keeps_whole_frames_at_even_spacing() -> None:
    view = grid_view(17, 2, 2, recent=1)
    kept = policies.get("uniform").keep(view, 5 * 4)
    frames = (view.time_us[0, kept[0]] // 500_000).unique_consecutive(return_counts=True)
    assert frames[0].tolist() == [0, 4, 8, 12, 16]
    assert frames[1].tolist() == [4] * 5


def test_uniform_stays_even_over_many_passes() -> None:
    """After forty passes of a growing stream the widest gap between kept frames is a small multiple of the mean one."""
    policy = policies.get("uniform")
    view = grid_view(12, 1, 2, recent=1)
    kept_times = torch.arange(12)
    for newest in range(12, 200):
        kept_times = torch.cat([kept_times, torch.tensor([newest])])
        count = len(kept_times)
        view = grid_view(count, 1, 2, recent=1)
        at = policy.keep(
            view.__class__(**{**view.__dict__, "time_us": (kept_times * 500_000).repeat_interleave(2).repeat(2, 1)}), 24
        )
        kept_times = kept_times.repeat_interleave(2)[at[0]].unique()
    gaps = kept_times.diff()
    assert len(kept_times) == 12
    assert int(gaps.max()) <= 3 * 199 / 11


def test_random_differs_by_head_layer_pass_and_seed_and_is_even() -> None:
    view = grid_view(50, 2, 2, recent=1, layer=0)
    policy = policies.get("random")
    kept = policy.keep(view, 104)
    assert not torch.equal(kept[0], kept[1])
    other = grid_view(50, 2, 2, recent=1, layer=1)
    assert not torch.equal(kept, policy.keep(other, 104))
    assert not torch.equal(kept, policies.get("random", seed=1).keep(view, 104))
    assert not torch.equal(kept[:, :60], policy.keep(thinned(view, kept, 1), 60))
    early = (kept < 98).float().mean()
    assert 0.4 < early < 0.56  # half of the survivors come from the older half


def test_random_takes_any_clock_and_any_seed() -> None:
    """Times may count from 1970, and from before the stream's start."""
    view = grid_view(20, 2, 2)
    policy = policies.get("random")
    for offset in (-(10**12), 1_800_000_000 * 10**6, 2**62):
        later = replace(view, time_us=view.time_us + offset)
        assert not torch.equal(policy.keep(later, 40), policy.keep(view, 40))
    assert policies.get("random", seed=-(10**30)).keep(view, 40).shape == (2, 40)


def test_a_seed_cannot_stand_in_for_a_layer() -> None:
    kept = [
        policies.get("random", seed=seed).keep(grid_view(20, 2, 2, layer=layer, layers=40), 40)
        for layer in range(3)
        for seed in (0, 1, 31, 62, 1009)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60, unique=True))
def test_uniform_halves_the_widest_gap_at_the_time_nearest_to_its_middle(times: list[int]) -> None:
    times.sort()
    ranks = _spread(times)
    assert sorted(ranks) == list(range(len(times)))
    order = sorted(range(len(times)), key=ranks.__getitem__)
    assert order[0] == len(times) - 1
    chosen = sorted(order[:2])
    for index in order[2:]:
        gaps = [(low, high) for low, high in pairwise(chosen) if high - low > 1]
        low, high = max(gaps, key=lambda gap: times[gap[1]] - times[gap[0]])
        widest = times[high] - times[low]
        low, high = next((a, b) for a, b in gaps if a < index < b)
        assert times[high] - times[low] == widest
        off = abs(2 * times[index] - times[low] - times[high])
        assert off == min(abs(2 * times[other] - times[low] - times[high]) for other in range(low + 1, high))
        chosen = sorted([*chosen, index])
