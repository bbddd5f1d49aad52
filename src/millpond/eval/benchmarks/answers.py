"""Answers on disk: one line for each video that an arm has watched, written through; settings beside them that every line shares.

A process may be killed at any moment: what was written counts, a line that was cut off is done again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.errors import MillpondError, first_line
from millpond.eval.benchmarks.base import Video
from millpond.eval.benchmarks.settings import Settings
from millpond.eval.benchmarks.watch import Pass
from millpond.printable import printable

_SETTINGS, _ANSWERS = "settings.json", "answers*.jsonl"


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `of` parts of the videos, counted from 1."""

    number: int = 1
    of: int = 1

    @property
    def file(self) -> str:
        """Where its answers go."""
        return "answers.jsonl" if self.of == 1 else f"answers.{self.number}-of-{self.of}.jsonl"

    def part(self, videos: Iterable[Video]) -> list[Video]:
        """Every `of`-th video."""
        return [video for place, video in enumerate(videos) if place % self.of == self.number - 1]


class Answers:
    """The answers in a folder, those of all shards together.

    Args:
        folder: made where it is not there.
        settings: those of this run. A folder without answers takes them whatever was there before.

    Raises:
        MillpondError: the folder holds answers that were given under other settings, or cannot be read.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._settings: dict[str, Any] = json.loads(json.dumps(settings.to_dict()))
        folder.mkdir(parents=True, exist_ok=True)
        if not read_passes(folder):
            write_json(folder / _SETTINGS, self._settings)
        self._check()

    def _check(self) -> None:
        before = read_settings(self._folder)
        if changed := [name for name, value in self._settings.items() if before.get(name) != value]:
            was, now = before.get(changed[0]), self._settings[changed[0]]
            raise MillpondError(
                f"{printable(str(self._folder))} holds answers with another {changed[0]} ({was!r}, not {now!r}): choose another --out"
            )

    def passes(self) -> dict[tuple[str, str], Pass]:
        """Of each video and arm the latest whole one, else the latest."""
        return read_passes(self._folder)

    def add(self, shard: Shard, found: Pass) -> None:
        """Write one down, so that it is there whatever happens next.

        Raises:
            MillpondError: another run has taken the folder meanwhile.
        """
        self._check()
        path = self._folder / shard.file
        line = json.dumps(found.to_dict()) + "\n"
        with path.open("a+b") as file:
            # A line that a crash cut off must not swallow this one.
            if file.seek(0, os.SEEK_END) and _last_byte(path) != b"\n":
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read_passes(folder: Path) -> dict[tuple[str, str], Pass]:
    """What is in a folder; lines that a crash cut off are left out."""
    found: dict[tuple[str, str], Pass] = {}
    for path in sorted(folder.glob(_ANSWERS)):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                one = Pass.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue
            key = one.video, one.arm
            if one.whole or not (key in found and found[key].whole):
                found[key] = one
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the answers in a folder.

    Raises:
        MillpondError: there are none, or they cannot be read.
    """
    path = folder / _SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MillpondError(f"there are no answers in {printable(str(folder))}") from None
    except (OSError, ValueError) as error:
        raise MillpondError(f"cannot read {printable(str(path))}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise MillpondError(f"cannot read {printable(str(path))}: it must hold an object")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all, in the place of one that is."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(part, 0o644)
    os.replace(part, path)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
