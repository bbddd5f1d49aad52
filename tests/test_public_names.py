"""The public names, pinned; and that they come without importing what they do not need."""

import subprocess
import sys

import millpond


def test_public_names_are_these_and_all_exist() -> None:
    assert millpond.__all__ == [
        "Answer",
        "Budget",
        "BudgetError",
        "Engine",
        "LayerMemory",
        "MillpondError",
        "ModelError",
        "PendingAnswer",
        "Plan",
        "PolicyError",
        "PondCache",
        "Session",
        "SessionConfig",
        "SnapshotError",
        "SourceError",
        "Usage",
        "__version__",
    ]
    for name in [*millpond.__all__, "frames", "models", "policies", "recompute", "standing"]:
        assert getattr(millpond, name) is not None
        assert name in dir(millpond) or name.startswith("__")


def test_the_package_alone_needs_no_torch() -> None:
    code = "import sys, millpond; millpond.BudgetError; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
