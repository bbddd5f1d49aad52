"""Runs tests in a fork of a process that has imported torch and transformers, but not yet the package: whole or mutated, or watched.

The package takes a fifth of a second to import, torch several seconds; so a mutant costs what its tests do.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from time import perf_counter, process_time
from types import CodeType, ModuleType
from typing import Any

import coverage
import pytest

__all__ = ["Outcome", "Reach", "preload", "run", "watch"]

_MEMORY = 4 << 30
"""What a mutant may allocate: one that asks for more has failed."""


@dataclass(frozen=True)
class Reach:
    """Which tests run which lines.

    Attributes:
        tests: processor seconds of each test that passes.
        lines: of each file, the tests that run each line; none of a line that only importing runs.
        failed: tests that fail without any mutation, and are left out.
    """

    tests: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    failed: list[str]

    @classmethod
    def read(cls, path: Path) -> Reach:
        """From a file that `write` made."""
        return cls.of_plain(json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> Reach:
        lines = {path: {int(line): tests for line, tests in found.items()} for path, found in plain["lines"].items()}
        return cls(plain["tests"], lines, plain["failed"])

    def without(self, files: set[str]) -> Reach:
        """What the tests of other files reach."""
        kept = {test for test in self.tests if _file(test) not in files}
        lines = {
            path: {line: [test for test in tests if test in kept] for line, tests in found.items()}
            for path, found in self.lines.items()
        }
        tests = {test: spent for test, spent in self.tests.items() if test in kept}
        return Reach(tests, lines, [test for test in self.failed if _file(test) not in files])

    def beside(self, other: Reach) -> Reach:
        """What the tests of both reach."""
        lines = {
            path: {
                line: sorted({*self.lines.get(path, {}).get(line, ()), *other.lines.get(path, {}).get(line, ())})
                for line in {*self.lines.get(path, {}), *other.lines.get(path, {})}
            }
            for path in {*self.lines, *other.lines}
        }
        return Reach({**self.tests, **other.tests}, lines, [*self.failed, *other.failed])

    def of(self, path: str, first: int, last: int) -> set[str]:
        """The tests that run one of some lines; all of them for lines that importing runs, whose effect may show anywhere."""
        lines = self.lines.get(path, {})
        found = {test for line in range(first, last + 1) for test in lines.get(line, ())}
        if not found and any(line in lines for line in range(first, last + 1)):
            found = set(self.tests)
        return found & self.tests.keys()


@dataclass(frozen=True)
class Outcome:
    """How tests went: "passed", "failed" at a test, failed to "import", ran out of "time" or "crashed"; and the processor seconds."""

    how: str
    test: str = ""
    seconds: float = 0.0


def preload() -> None:
    """Import what is not mutated. Nothing is computed: a fork would miss the threads."""
    import av  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy as np  # noqa: F401
    import torch
    import transformers

    for name in ("LlavaNextVideo", "LlavaOnevision", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL"):
        getattr(transformers, f"{name}ForConditionalGeneration")
    assert transformers.Qwen2ForCausalLM

    torch.set_num_threads(1)
    assert "millpond" not in sys.modules


def run(tests: Sequence[str], limit: float, path: Path | None = None, source: str | None = None) -> Outcome:
    """Run tests file by file, in this order, up to the first that fails, with one file's source replaced.

    Args:
        tests: as pytest calls them.
        limit: in processor seconds; ten times as long on the clock.
    """

    def work(folder: Path) -> dict[str, Any]:
        if path is not None and source is not None:
            sys.meta_path.insert(0, _Mutated(path, source))
        for file in dict.fromkeys(
            map(_file, tests)
        ):  # one at a time: most mutants die before the others need to be collected
            seen = _Seen([test for test in tests if _file(test) == file])
            code = pytest.main(["-x", *_OPTIONS, f"--basetemp={folder}", file], [seen])
            if code:
                return {"how": _HOW.get(int(code), "import"), "test": seen.failed[0] if seen.failed else ""}
        return {"how": "passed", "test": ""}

    start = perf_counter()
    answer, seconds, code = _forked(work, limit)
    if answer is None:
        slow = code in (-signal.SIGXCPU, -signal.SIGKILL) or perf_counter() - start > limit
        return Outcome("time" if slow else "crashed", seconds=round(seconds, 2))
    return Outcome(answer["how"], answer["test"], round(seconds, 2))


def watch(root: Path, paths: Sequence[str], folders: Sequence[str], marks: str) -> Reach:
    """Run all tests once, and note which lines of which files each one runs."""

    def work(folder: Path) -> dict[str, Any]:
        cover = coverage.Coverage(data_file=None, include=[str(root / path) for path in paths], config_file=False)
        seen = _Seen(None, cover)
        cover.start()
        code = pytest.main([*_OPTIONS, f"--basetemp={folder}", "-m", marks, *folders], [seen])
        cover.stop()
        if int(code) not in (0, 1):
            raise SystemExit(f"pytest ended with {code}: the tests cannot be collected")
        data, lines = cover.get_data(), {}
        for path in paths:
            contexts = data.contexts_by_lineno(str(root / path))
            lines[path] = {line: sorted(set(tests) - {""}) for line, tests in contexts.items()}
        passed = {test: spent for test, spent in seen.seconds.items() if test not in {*seen.failed, *seen.skipped}}
        return {"tests": passed, "lines": lines, "failed": seen.failed}

    answer, _, code = _forked(work, limit=7200, silent=False)
    if answer is None:
        raise SystemExit(f"the run that is watched ended with {code}")
    return Reach.of_plain(answer)


_OPTIONS = (
    "-q",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:randomly",
    "-p",
    "no:xdist",
    "-p",
    "no:anyio",
    "--hypothesis-seed=0",
)
_HOW = {1: "failed"}


def _file(test: str) -> str:
    return test.split("::")[0]


class _Mutated(MetaPathFinder):
    """Imports one file from a changed source."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        for folder in path or ():
            module = Path(folder, name.rpartition(".")[2])
            if self._path in (module.with_suffix(".py"), module / "__init__.py"):
                loader = _Loader(name, self._path, self._source)
                places = [str(module)] if self._path.name == "__init__.py" else None
                return spec_from_file_location(name, self._path, loader=loader, submodule_search_locations=places)
        return None


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec")


class _Seen:
    """Chooses and orders tests, and writes down how they went."""

    def __init__(self, tests: Sequence[str] | None, cover: coverage.Coverage | None = None) -> None:
        self._order = None if tests is None else {test: place for place, test in enumerate(tests)}
        self._cover = cover
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._order is not None:
            order = self._order
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        if self._cover is not None:
            self._cover.switch_context(item.nodeid)
        start = process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = round(process_time() - start, 4)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped.append(report.nodeid)


def _forked(
    work: Callable[[Path], dict[str, Any]], limit: float, silent: bool = True
) -> tuple[dict[str, Any] | None, float, int]:
    """What work returned in a fork, or None; its processor seconds and exit code. A silent one prints nothing."""
    with tempfile.TemporaryDirectory() as folder:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                os.setpgid(0, 0)
                if silent:
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    for stream in (0, 1, 2):
                        os.dup2(nowhere, stream)
                resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
                answer = json.dumps(work(Path(folder, "tests"))).encode()
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(answer)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        answer = _read(reading, 10 * limit + 30)
        if answer is None:
            os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return (json.loads(answer) if code == 0 and answer else None), used.ru_utime + used.ru_stime, code


def _read(reading: int, seconds: float) -> bytes | None:
    """All that a pipe brings until its other end is closed; None when that takes too long."""
    found, end = b"", perf_counter() + seconds
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while (left := end - perf_counter()) > 0:
            if select.select([pipe], [], [], left)[0]:
                part = pipe.read(1 << 16)
                if not part:
                    return found
                found += part
    return None
