"""docs/cli.md is what the commands say of themselves."""

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_up_to_date(environment: dict[str, str]) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "millpond.cli.reference"], env=environment, capture_output=True, text=True, check=True
    )
    assert PAGE.read_text() == made.stdout, "run: python -m millpond.cli.reference > docs/cli.md"


def test_the_page_does_not_depend_on_the_terminal(environment: dict[str, str]) -> None:
    narrow = environment | {"COLUMNS": "40", "MILLPOND_MODEL": "elsewhere", "TERM": os.environ.get("TERM", "dumb")}
    made = subprocess.run(
        [sys.executable, "-m", "millpond.cli.reference"], env=narrow, capture_output=True, text=True, check=True
    )
    assert made.stdout == PAGE.read_text()


def test_asking_for_help_does_not_wait_for_torch(environment: dict[str, str]) -> None:
    code = "import sys, millpond.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
