"""A fault at a chosen line: for tests that raise at every line of some files in turn."""

import linecache
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from types import FrameType
from typing import Any


def files_of(*modules: str) -> set[str]:
    """Where modules lie; a module that is not there is a fault of the test."""
    specs = {name: find_spec(name) for name in modules}
    assert all(spec is not None and spec.origin for spec in specs.values()), specs
    return {str(spec.origin) for spec in specs.values() if spec is not None}


FILES = files_of(
    "millpond.session",
    "millpond.stream.runner",
    "millpond.stream.ingest",
    "millpond.stream.step",
    "millpond.stream.turn",
    "millpond.stream.generate",
    "millpond.stream.recent_frames",
    "millpond.stream.pending_answer",
    "millpond.stream.exclusive",
    "millpond.stream.holding",
    "millpond.cache.pond",
    "millpond.cache.turn_slots",
)
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

    before, elsewhere = sys.gettrace(), threading.gettrace()
    threading.settrace(trace)  # of threads that are started meanwhile
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
        threading.settrace(elsewhere)  # type: ignore[arg-type]
