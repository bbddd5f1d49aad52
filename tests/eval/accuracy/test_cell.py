"""Cells: what a budget is a share of, which cells a list of policies makes, what cannot be read."""

from fractions import Fraction

import pytest

from millpond.errors import BudgetError, PolicyError
from millpond.eval.accuracy import Cell, read_budget, read_cells


def test_budgets_are_shares_or_sizes() -> None:
    assert read_budget("1/16") == Fraction(1, 16)
    assert read_budget("256KiB") == 256 * 1024
    assert Cell("recent", Fraction(1, 3), "absolute").bytes_of(100) == 33
    assert Cell("recent", 77, "absolute").bytes_of(100) == 77
    assert Cell("full", None, "absolute").bytes_of(100) is None


@pytest.mark.parametrize("text", ["1/0", "3/2", "0/4", "-1/4", "a/b", "many"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        read_budget(text)


def test_capped_policies_meet_every_budget_and_the_others_none() -> None:
    cells = read_cells(["full", "recent", "last-4-frames", "recent"], ["1/2", "1/4"], "contiguous")
    assert [(cell.policy, cell.budget) for cell in cells] == [
        ("full", None),
        ("recent", Fraction(1, 2)),
        ("recent", Fraction(1, 4)),
        ("last-4-frames", None),
    ]
    assert len({cell.name for cell in cells}) == len(cells)


def test_parameters_make_cells_of_their_own_and_mistakes_are_named() -> None:
    plain, other = read_cells(["infinipot-v", "infinipot-v:alpha=0.3:pooling=1"], ["1/4"], "absolute")
    assert plain.name != other.name
    with pytest.raises(PolicyError, match="alpha must lie between"):
        read_cells(["infinipot-v:alpha=3"], ["1/4"], "absolute")
    with pytest.raises(PolicyError, match="has no parameter 'beta'"):
        read_cells(["infinipot-v:beta=1"], ["1/4"], "absolute")
    with pytest.raises(PolicyError, match="parameter=value"):
        read_cells(["infinipot-v:alpha"], ["1/4"], "absolute")
    with pytest.raises(PolicyError, match="no policy is called 'nothing'"):
        read_cells(["nothing"], ["1/4"], "absolute")


def test_frames_shown_again_make_cells_of_their_own_and_leave_the_other_names_as_they_were() -> None:
    names = ["full", "last-4-frames", "recent"]
    plain, again = (read_cells(names, ["1/4"], "contiguous", count) for count in (0, 4))
    assert [cell.name for cell in plain] == [
        "full @ - contiguous",
        "last-4-frames @ - contiguous",
        "recent @ 1/4 contiguous",
    ]
    assert [cell.name for cell in again] == [
        "full @ - contiguous, 4 recent frames",
        "last-4-frames @ - contiguous",
        "recent @ 1/4 contiguous, 4 recent frames",
    ]
