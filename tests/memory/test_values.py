"""What is handed around as a value cannot be written to: states, plans, lines and policies are shared without a copy."""

import importlib
import pkgutil
from dataclasses import is_dataclass
from typing import Any

ROOMS = ("cache", "memory", "policies", "positions")


def dataclasses() -> list[type[Any]]:
    """Every dataclass of those rooms, where it is defined."""
    found = []
    for room in ROOMS:
        package = importlib.import_module(f"millpond.{room}")
        names = [
            package.__name__,
            *(one.name for one in pkgutil.walk_packages(package.__path__, package.__name__ + ".")),
        ]
        for name in names:
            members = vars(importlib.import_module(name)).values()
            found += [
                kind for kind in members if isinstance(kind, type) and kind.__module__ == name and is_dataclass(kind)
            ]
    return found


def test_only_the_clock_can_be_written_to() -> None:
    open_ = {kind.__name__ for kind in dataclasses() if not kind.__dataclass_params__.frozen}
    assert open_ == {"Clock"}
