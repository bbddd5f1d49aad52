"""The policy that docs/policies/writing.md shows in full is the one that ships."""

import re
from pathlib import Path

from millpond.policies.methods import keydiff


def test_the_policy_shown_in_the_docs_is_the_one_in_the_package() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies" / "writing.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert code.group(1) == Path(keydiff.__file__).read_text()
