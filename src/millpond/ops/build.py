"""Compiles a C++ file once into the user's cache folder and loads it; without a compiler, what the wheel brought.

Imports nothing of millpond: `setup.py` runs this file to compile what a wheel carries.
"""

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

# Nothing like -ffast-math: linking with that would switch the whole process to flush subnormal numbers to zero.
_HEADERS = Path(__file__).parent
_FLAGS = (f"-I{_HEADERS}", *["-O3", "-ffp-contract=fast", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"])
_NATIVE = "-march=native"
# What a wheel's libraries ask of a processor beside its architecture, as Linux and macOS name it.
_PORTABLE = {"x86_64": ("-march=x86-64-v3",)}
_X86_64_V3 = ("avx2", "bmi2", "fma")


@cache
def compiled(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The loaded library of a C++ file and where it is, or None and why there is none."""
    if os.environ.get("MILLPOND_NATIVE", "1") == "0":
        return None, "switched off by MILLPOND_NATIVE=0"
    compiler = _compiler()
    if compiler is None:
        return _prebuilt(source, "no C++ compiler")
    # The processor is part of the key: a home folder may be shared between machines.
    contents = b"".join(path.read_bytes() for path in (source, *sorted(_HEADERS.glob("*.h"))))
    key = hashlib.sha256(contents + "".join((*_FLAGS, _NATIVE, compiler, platform.processor(), _cpu())).encode())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millpond"
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / target.name
                _compile(compiler, source, built, (_NATIVE,))
                built.replace(target)  # atomic: two processes may build at once
        return ctypes.CDLL(str(target)), str(target)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        return _prebuilt(source, f"could not be built: {type(error).__name__}")


def compile_to(source: Path, target: Path) -> None:
    """Compile a C++ file for every processor that a wheel of this platform may meet.

    Raises:
        RuntimeError: there is no C++ compiler. subprocess.SubprocessError: it failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("a wheel with compiled kernels needs a C++ compiler")
    _compile(compiler, source, target, _PORTABLE.get(platform.machine(), ()))


def prebuilt_name(source: Path) -> Path:
    """Where a wheel carries the library of a C++ file: in `prebuilt` beside it."""
    return source.parent / "prebuilt" / f"{source.stem}.so"


def _compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _compile(compiler: str, source: Path, target: Path, flags: tuple[str, ...]) -> None:
    command = [compiler, *_FLAGS, *flags, str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _prebuilt(source: Path, why: str) -> tuple[ctypes.CDLL | None, str]:
    """What the wheel brought, where this processor runs it; else None and `why` nothing was built here."""
    library = prebuilt_name(source)
    if not library.exists():
        return None, why
    words = _cpu().split()
    if platform.machine() == "x86_64" and not all(word in words for word in _X86_64_V3):
        return None, f"{why}, and the processor lacks one of {', '.join(_X86_64_V3)}"
    try:
        return ctypes.CDLL(str(library)), str(library)
    except OSError as error:
        return None, f"{why}, and the wheel's does not load: {error}"


def _cpu() -> str:
    """What `-march=native` depends on; lower case."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _cpu_of_macos() or platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def _cpu_of_macos() -> str:
    try:
        names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
        return subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, timeout=10).stdout.lower()
    except (OSError, subprocess.SubprocessError):
        return ""
