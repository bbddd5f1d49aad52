"""Bytes shared out: the arithmetic, and the account of who holds what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond import BudgetError
from millpond.engine.shares import Claim, Grants, share_out


@st.composite
def claims(draw: st.DrawFn) -> list[Claim]:
    made = []
    for index in range(draw(st.integers(1, 6))):
        least = draw(st.integers(0, 400))
        most = draw(st.none() | st.integers(least, 2000))
        made.append(Claim(str(index), draw(st.floats(0.01, 100)), least, most))
    return made


@given(st.integers(0, 3000), claims())
def test_shares_keep_to_the_total_and_to_every_claim_and_leave_nothing_that_somebody_could_take(
    total: int, made: list[Claim]
) -> None:
    least = sum(claim.least for claim in made)
    if least > total:
        with pytest.raises(BudgetError) as refused:
            share_out(total, made)
        assert refused.value.minimum == least
        return
    shares = share_out(total, made)
    assert sum(shares.values()) <= total
    for claim in made:
        assert claim.least <= shares[claim.name]
        assert claim.most is None or shares[claim.name] <= claim.most
    hungry = [claim for claim in made if claim.most is None or shares[claim.name] < claim.most]
    assert not hungry or total - sum(shares.values()) <= len(hungry)  # a byte of rounding each, at most


def test_shares_go_by_weight_where_claims_allow_it() -> None:
    assert share_out(900, [Claim("a", 1, 0), Claim("b", 2, 0)]) == {"a": 300, "b": 600}
    assert share_out(900, [Claim("a", 1, 500), Claim("b", 2, 0)]) == {"a": 500, "b": 400}
    assert share_out(900, [Claim("a", 1, 0), Claim("b", 2, 0, 150)]) == {"a": 750, "b": 150}


def test_a_grant_above_what_is_free_is_refused_and_changes_nothing() -> None:
    grants = Grants(100)
    grants.set("a", 60)
    with pytest.raises(BudgetError, match=r"'b' would need 41 B more, and 40 B are free"):
        grants.set("b", 41)
    assert (grants.of("b"), grants.free) == (0, 40)
    grants.set("a", 10)
    grants.set("b", 90)
    assert grants.free == 0
