"""The blind baselines: what each keeps, told by hand or by brute force."""

import torch

from millpond import policies
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
