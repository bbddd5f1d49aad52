"""The best of many scores against sorting them, compiled and in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.ops import dispatch
from millpond.policies.base import keep_top


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan]), st.floats(width=32)),
        min_size=1,
        max_size=40,
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_best_are_those_of_sorting_ties_and_oddities_included(scores: list[float], share: float, seed: int) -> None:
    slots = max(1, round(share * len(scores)))
    rows = torch.tensor([scores, scores[::-1]])
    protected = torch.zeros(rows.shape, dtype=torch.bool)
    protected[:, torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[: slots // 2]] = True
    # An infinite score counts for less than protection.
    finite = rows.masked_fill(rows.isnan(), -torch.inf).clamp(max=torch.finfo(torch.float32).max)
    ranked = finite.masked_fill(protected, torch.inf).tolist()
    expected = [sorted(sorted(range(len(row)), key=lambda n, row=row: (-row[n], n))[:slots]) for row in ranked]
    assert keep_top(rows.clone(), protected, slots).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernels_enabled", False)
        assert keep_top(rows.clone(), protected, slots).tolist() == expected
