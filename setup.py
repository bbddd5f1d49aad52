"""A wheel with compiled kernels, for people without a compiler: `MILLPOND_PREBUILD=1 pip wheel --no-deps .`

Without that variable nothing is compiled and the wheel is a pure one: the kernels are then built on first use. Everything else
about the package stands in pyproject.toml.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent / "src"
BUILD = runpy.run_path(str(ROOT / "millpond" / "ops" / "build.py"))
SOURCES = sorted(ROOT.glob("millpond/ops/*.cpp"))


class PlainLibraries(build_ext):
    """Shared libraries that are loaded by ctypes: they know nothing about Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        BUILD["compile_to"](Path(ext.sources[0]).resolve(), target)


class AnyPython(bdist_wheel):
    """One wheel a platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extension(source: Path) -> Extension:
    library = BUILD["prebuilt_name"](source).relative_to(ROOT).with_suffix("")
    return Extension(".".join(library.parts), [str(source.relative_to(ROOT.parent))])


if os.environ.get("MILLPOND_PREBUILD") == "1":
    setup(
        ext_modules=[extension(source) for source in SOURCES],
        cmdclass={"build_ext": PlainLibraries, "bdist_wheel": AnyPython},
    )
else:
    setup()
