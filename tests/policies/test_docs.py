"""The policy that docs/policies.md shows in full works."""

import re
from pathlib import Path

from millpond.policies.base import Policy
from tests.policies.views import grid_view
from tests.session.measure import transient_peak


def test_the_policy_shown_in_the_docs_runs_and_keeps_its_word() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    room: dict[str, object] = {"__name__": "shown"}
    exec(compile(code.group(1), "docs/policies.md", "exec", dont_inherit=True), room)
    policy = room["KeyDiff"]()  # type: ignore[operator]
    assert isinstance(policy, Policy)
    view = grid_view(10, 4, 4, recent=2, width=32)
    keep = policy.keep(view, 80)
    assert keep.shape == (2, 80)
    assert bool((view.protected.gather(1, keep).sum(1) == 32).all())
    assert transient_peak(lambda: policy.keep(view, 80)) <= policy.scratch(2, view.tokens, 32, 16, view.chunk)
