"""Which cases of a test `make test` runs, and which are left to `make nightly`: one case a mechanism by day, every combination by night."""

from collections.abc import Sequence
from typing import Any

import pytest


def nightly(cases: Sequence[Any], *, but: Sequence[Any]) -> list[Any]:
    """All `cases` for `parametrize`; those that are not in `but` carry the marker `nightly`."""
    unknown = [case for case in but if case not in cases]
    assert not unknown, f"these are no cases of the test: {unknown}"
    return [case if case in but else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
