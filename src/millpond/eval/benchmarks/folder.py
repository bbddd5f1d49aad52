"""A benchmark's folder as people have it on disk: annotation files by name, videos wherever they lie below it.

Nothing outside the folder is opened, whatever paths the annotations name.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from millpond.errors import MillpondError, first_line
from millpond.eval.benchmarks.base import Annotations, Fault, Query, Video, fingerprint
from millpond.printable import printable

_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")


class RowError(Exception):
    """A row of the annotations says nothing usable; the message says what is wrong with it."""


class Folder:
    """Everything below a folder, listed once; links to folders are followed.

    Raises:
        MillpondError: it is none.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise MillpondError(f"there is no folder {printable(str(root))}")
        self.root = root
        self._files: list[Path] = []
        self._videos: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for where, folders, names in os.walk(root, followlinks=True):
            if (real := os.path.realpath(where)) in seen:  # a link that leads back
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(names):
                path = Path(where) / name
                self._files.append(path)
                if path.suffix.lower() in _VIDEOS:
                    self._videos.setdefault(path.stem, []).append(path)

    def named(self, *names: str) -> list[Path]:
        """Files of these names (a leading * stands for anything), those nearest to the root first."""
        found = [path for path in self._files if any(path.match(name) for name in names)]
        return sorted(found, key=lambda path: (len(path.parts), path))

    def one(self, *names: str) -> Path:
        """The file of the first of these names that is there.

        Raises:
            MillpondError: none of them is.
        """
        for name in names:
            if found := self.named(name):
                return found[0]
        raise MillpondError(f"there is no {' or '.join(names)} in or below {printable(str(self.root))}")

    def video(self, name: str) -> Path | None:
        """The video that the annotations call so: the file whose path ends like it, else the only one of its name.

        Args:
            name: a path or a bare name, with or without its ending; other endings of video files are found too.

        Raises:
            LookupError: several have the name and none the path.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        stem = wanted.stem if wanted.suffix.lower() in _VIDEOS else wanted.name
        found = self._videos.get(stem, [])
        parents = tuple(part for part in wanted.parent.parts if part not in ("..", "/"))
        for first in range(len(parents)):
            end = parents[first:]
            if like := [path for path in found if path.parent.parts[-len(end) :] == end]:
                return like[0]
        if len(found) > 1:
            places = ", ".join(sorted(str(path.parent.relative_to(self.root)) for path in found)[:4])
            raise LookupError(f"the video {printable(name)} may be one of {len(found)}, in {printable(places)}")
        return found[0] if found else None


def load_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        MillpondError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = getattr(error, "strerror", None) or first_line(error)
        raise MillpondError(f"cannot read {printable(str(path))}: {what}") from error


def load_rows(path: Path) -> list[Any]:
    """The rows of a file: a JSON list, a JSON object a line (.jsonl), or a table (.parquet, with pyarrow).

    Raises:
        MillpondError: it cannot be read, or holds no rows.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        rows: list[Any] = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise MillpondError(f"cannot read {printable(str(path))}: {first_line(error)}") from error
        for line in lines:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(line)  # told as a row that is none
        return rows
    rows = load_json(path)
    if not isinstance(rows, list):
        raise MillpondError(f"{printable(str(path))} must hold a list of rows, not {type(rows).__name__}")
    return rows


def _parquet(path: Path) -> list[Any]:
    try:
        reader = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MillpondError(
            f"reading {printable(path.name)} needs pyarrow: pip install pyarrow, or give the rows as JSON"
        ) from error
    try:
        rows: list[Any] = reader.read_table(path).to_pylist()
    except Exception as error:  # a stranger's file: what it makes the library do wrong has no end
        raise MillpondError(f"cannot read {printable(str(path))}: {first_line(error)}") from error
    return rows


class Reader:
    """Collects questions row by row, with what is wrong, and groups them by video.

    Args:
        folder: where the videos are looked for.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._queries: dict[str, list[Query]] = {}
        self._also: dict[str, str] = {}
        self._ids: set[str] = set()
        self._faults: list[Fault] = []

    @contextmanager
    def row(self, path: Path, index: int) -> Iterator[None]:
        """Around the reading of one row, counted from 0: a `RowError` within it becomes a fault."""
        try:
            yield
        except RowError as error:
            self._faults.append(Fault("malformed row", f"{printable(path.name)}, row {index + 1}: {error}"))

    def add(self, video: str, *queries: Query, also: str | None = None) -> None:
        """Questions about a video, in whatever order.

        Args:
            also: another name under which the video may lie.

        Raises:
            RowError: one of them is there already; then none is added.
        """
        if taken := [query.id for query in queries if query.id in self._ids]:
            raise RowError(f"the question {printable(taken[0])} appears twice")
        self._ids.update(query.id for query in queries)
        self._queries.setdefault(video, []).extend(queries)
        if also is not None:
            self._also[video] = also

    def done(self) -> Annotations:
        """All of them: each video's questions by the time of asking, those at its end last."""
        videos, faults = [], list(self._faults)
        for name, queries in self._queries.items():
            path, fault = self._find(name)
            if path is None:
                faults.append(Fault("missing video", fault, sum(query.after_yes is None for query in queries)))
                continue
            ordered = sorted(queries, key=lambda query: float("inf") if query.seconds is None else query.seconds)
            videos.append(Video(name, path, tuple(ordered)))
        everything = [(name, query) for name, queries in self._queries.items() for query in queries]
        asked = tuple(query for _, query in everything)
        return Annotations(tuple(videos), tuple(faults), asked, fingerprint(everything))

    def _find(self, name: str) -> tuple[Path | None, str]:
        """A video, or why there is none."""
        fault = f"there is no video {printable(name)}"
        for called in (name, *([self._also[name]] if name in self._also else [])):
            try:
                if path := self._folder.video(called):
                    return path, ""
            except LookupError as error:
                fault = str(error)
        return None, fault


# --- fields of a row ----------------------------------------------------------------------------------------------------


def as_object(row: Any) -> dict[str, Any]:
    """The row, if it is an object; raises RowError."""
    if not isinstance(row, dict):
        raise RowError(f"it must be an object, not {type(row).__name__}")
    return row


def text(row: dict[str, Any], key: str) -> str:
    """A field that holds words; raises RowError."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key!r} must be text, not {_shown(value)}")
    return value


def number(row: dict[str, Any], key: str) -> float:
    """A field that holds a number from 0 on; raises RowError."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise RowError(f"{key!r} must be a number from 0 on, not {_shown(value)}")
    return float(value)


def texts(row: dict[str, Any], key: str, *, fewest: int = 2, most: int = 26) -> list[str]:
    """A field that holds a list of texts, numbers written out; raises RowError."""
    values = row.get(key)
    if not isinstance(values, list) or not fewest <= len(values) <= most:
        raise RowError(f"{key!r} must be a list of {fewest} texts or more, not {_shown(values)}")
    if odd := [value for value in values if isinstance(value, bool) or not isinstance(value, str | int | float)]:
        raise RowError(f"{key!r} must hold texts, not {_shown(odd[0])}")
    return [str(value) for value in values]


def objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A field that holds a list of objects; raises RowError."""
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise RowError(f"{key!r} must be a list, not {_shown(values)}")
    return [as_object(value) for value in values]


def letter(row: dict[str, Any], key: str, options: int) -> str:
    """A field that holds the letter of one of so many options; raises RowError."""
    value = text(row, key).strip()
    if value not in [chr(ord("A") + index) for index in range(options)]:
        raise RowError(f"{key!r} must be the letter of one of {options} options, not {_shown(value)}")
    return value


def index(row: dict[str, Any], key: str, options: int) -> str:
    """A field that holds the index of one of so many options, from 0, as its letter; raises RowError."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < options:
        raise RowError(f"{key!r} must be the index of one of {options} options, not {_shown(value)}")
    return chr(ord("A") + value)


def _shown(value: Any) -> str:
    shown = "nothing" if value is None else printable(repr(value))
    return shown if len(shown) <= 60 else shown[:57] + "..."
