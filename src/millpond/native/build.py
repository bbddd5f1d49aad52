"""Compiles a C++ file once into the user's cache folder and loads it. Knows nothing about what is in it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["compiled"]

# Nothing like -ffast-math: linking with that would switch the whole process to flush subnormal numbers to zero.
_HEADERS = Path(__file__).parent
_FLAGS = (
    f"-I{_HEADERS}",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-std=c++17",
    "-shared",
    "-fPIC",
)


@cache
def compiled(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The loaded library of a C++ file and where it is, or None and why there is none."""
    if os.environ.get("MILLPOND_NATIVE", "1") == "0":
        return None, "switched off by MILLPOND_NATIVE=0"
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "no C++ compiler"
    # The processor is part of the key: a home folder may be shared between machines.
    contents = b"".join(path.read_bytes() for path in (source, *sorted(_HEADERS.glob("*.h"))))
    key = hashlib.sha256(contents + "".join((*_FLAGS, compiler, platform.processor(), _cpu())).encode())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millpond"
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                command = [compiler, *_FLAGS, str(source), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                built.replace(target)  # atomic: two processes may build at once
        return ctypes.CDLL(str(target)), str(target)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        return None, f"could not be built: {type(error).__name__}"


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())
