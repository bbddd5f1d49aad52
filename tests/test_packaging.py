"""What a wheel and a source archive carry, without building either where the check needs none."""

import ctypes
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millpond.ops import build, rerotate, rerotation

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "millpond" / "ops" / "rerotation.cpp"


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the wheel's library of rerotation.cpp lies on a machine without a compiler; nothing lies there yet."""
    library = tmp_path / "prebuilt" / "rerotation.so"
    if build._compiler() is None:
        pytest.skip("no C++ compiler to make a wheel's library with")
    library.parent.mkdir()
    build.compile_to(SOURCE, library)
    monkeypatch.setattr(build, "_compiler", lambda: None)
    monkeypatch.setattr(build, "prebuilt_name", lambda source: library.parent / f"{source.stem}.so")
    build.compiled.cache_clear()
    monkeypatch.setattr(rerotation._C_REROTATE, "_found", None)
    yield library
    build.compiled.cache_clear()


def test_a_wheels_kernels_run_where_there_is_no_compiler(without_compiler: Path) -> None:
    loaded, where = build.compiled(SOURCE)
    assert isinstance(loaded, ctypes.CDLL)
    assert where == str(without_compiler)
    keys, axis, inv_freq = torch.randn(1, 5, 8), torch.zeros(4, dtype=torch.long), torch.rand(4)
    by = torch.arange(5)[:, None]
    angle = by * inv_freq
    low, high = keys[..., :4].clone(), keys[..., 4:].clone()
    assert rerotate.kernels["cpu"](keys, by, axis, inv_freq) is None
    torch.testing.assert_close(keys[..., :4], low * angle.cos() - high * angle.sin())


def test_a_pure_wheel_says_that_there_is_no_compiler(without_compiler: Path) -> None:
    without_compiler.unlink()
    assert build.compiled(SOURCE) == (None, "no C++ compiler")


def test_a_processor_that_cannot_run_a_wheels_kernels_is_not_given_them(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_cpu", lambda: "flags : sse2 avx fma")
    assert build.compiled(SOURCE) == (None, "no C++ compiler, and the processor lacks one of avx2, bmi2, fma")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    from setuptools import build_meta

    folder = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_meta.build_sdist(str(folder))
    with tarfile.open(folder / name) as opened:
        opened.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


def test_the_source_archive_carries_tests_docs_and_kernels(archive: Path) -> None:
    names = {str(path.relative_to(archive)) for path in archive.rglob("*")}
    for path in ("CHANGELOG.md", "LICENSE", "setup.py", "constraints.txt", "docs/index.md", "tests/test_packaging.py"):
        assert path in names
    assert {"training/minnow/train.py", "examples/own_policy.py"} <= names
    assert {f"src/{source.relative_to(ROOT / 'src')}" for source in ROOT.glob("src/**/*.cpp")} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_the_wheel_carries_what_runs_models_and_nothing_that_trains_minnow(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setuptools import build_meta

    monkeypatch.chdir(archive)
    with zipfile.ZipFile(build_meta.build_wheel(".")) as wheel:
        names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"millpond"}
    source = ROOT / "src"
    carried = {str(path.relative_to(source)) for path in source.glob("millpond/**/*") if path.is_file()}
    assert {name for name in carried if not name.endswith((".pyc", ".so"))} <= names, "data among them: weights, digits"
    assert {name for name in names if name.startswith("millpond/minnow/") and name.endswith(".py")} == {
        f"millpond/minnow/{name}.py" for name in ("__init__", "checkpoint", "familiar")
    }
