"""A fault at a chosen line: for tests that raise at every line of some files in turn."""

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import millpond

FOLDER = Path(millpond.__file__).parent
FILES = {
    str(FOLDER / f"{name}.py")
    for name in (
        *("session", "runner", "ingest", "step", "turn", "decoding", "second_look", "exclusive"),
        *("cache/pond", "cache/recent"),
    )
}
Line = tuple[str, int]


def lines_of(run: Callable[[], Any]) -> list[Line]:
    """Every line of those files that runs, once, in the order of its first time.

    Without those that say `try:` alone: they do nothing, so nothing can be raised there but by a tracer, in front of their handlers.
    """
    found: dict[Line, None] = {}
    _traced(run, lambda line: found.setdefault(line))
    return [line for line in found if linecache.getline(*line).strip() != "try:"]


def raise_at(line: Line, error: type[BaseException], run: Callable[[], Any]) -> bool:
    """Run with `error` raised when the line is reached for the first time; returns whether it came through."""
    open_ = [True]

    def check(here: Line) -> None:
        if here == line and open_:
            open_.clear()
            raise error("injected")

    try:
        _traced(run, check)
    except error as caught:
        return "injected" in str(caught)
    return False


def _traced(run: Callable[[], Any], see: Callable[[Line], Any]) -> None:
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            see((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
