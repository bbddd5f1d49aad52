"""Every Python snippet of the README and the docs runs, word for word, on real sources and models."""

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import millpond
from millpond import frames, minnow, models, precision
from millpond.cli import app
from millpond.eval import streams
from tests.frames.media import gray

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run all snippets of a page, one after another in one module, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, **known: Any) -> dict[str, Any]:
        module = types.ModuleType("snippet")
        monkeypatch.setitem(sys.modules, "snippet", module)
        module.__dict__.update(known)
        for snippet in snippets(PAGES[name]):
            exec(compile(snippet, name, "exec", dont_inherit=True), module.__dict__)
        return module.__dict__

    return run


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """130 s at 29.97 frames a second, of which every fifteenth is there: no picture is at a whole minute."""
    path = tmp_path / "clip.mp4"
    frames.write_mp4(path, ((index * 15 * 1001 / 30_000, gray(index % 200, 64, 64)) for index in range(260)), fps=2)
    return path


def camera(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a snippet leads to a film, which ends."""
    plain = frames.open

    def opened(source: Any, fps: float | None = None, **options: Any) -> frames.Source:
        return plain(film if str(source).startswith("rtsp://") else source, fps, **options)

    monkeypatch.setattr(frames, "open", opened)


def test_every_page_with_snippets_is_run_here() -> None:
    text = Path(__file__).read_text()
    for name, page in PAGES.items():
        assert not snippets(page) or f'"{name}"' in text, f"no test runs the snippets of {name}"


def test_readme(run: Any, film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    camera(film, monkeypatch)
    Path("models").mkdir()
    # A folder of the same family as the one that the page names, small enough for a test.
    Path("models/Qwen2.5-VL-3B-Instruct").symlink_to(minnow.folder())
    session = run("README.md")["session"]
    assert session.usage.frames_seen == 260
    *answers, usage = capsys.readouterr().out.splitlines()
    # After one minute and after two; the second falls out where the first is still being answered.
    assert len(answers) in (2, 3)
    assert usage.endswith(f"<= {256 << 20}")
    saved = millpond.Session.load("camera.millpond", session.family)
    assert saved.usage.frames_seen == 260


def test_streams_of_real_pixels(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stream = run("docs/accuracy/streams.md")["stream"]
    assert len(capsys.readouterr().out.splitlines()) == len(stream.questions) > 10


def test_contributing(run: Any, film: Path) -> None:
    commands = typer.Typer()
    commands.command()(run("CONTRIBUTING.md")["count"])
    assert CliRunner().invoke(commands, [str(film), "--fps", "1", "--json"]).stdout == '{"frames": 130}\n'


def test_streams(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = millpond.Session(models.load("minnow"), budget="2MiB")
    pictures = list(streams.generate(5, groups=6).frames())
    session.feed(pictures[:8])
    ran = run("docs/memory/streams.md", session=session, next_frames=pictures[8:])
    told = ran["answer"].result()
    assert capsys.readouterr().out == f"{told.text}{told.finish_reason}\n"
    assert session.usage.frames_seen == 12


def test_sources(run: Any, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera(film, monkeypatch)
    session = millpond.Session(models.load("minnow"), budget="1MiB")
    run("docs/sources.md", session=session, pixels=[gray(index) for index in range(100)])
    assert session.usage.frames_seen == 130
    assert sum(1 for _ in frames.open("out.mp4")) == 100


def test_snapshots(run: Any, film: Path) -> None:
    assert run("docs/snapshots.md")["again"].usage.frames_seen > 0


def test_engine(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/engine.md", source=streams.generate(7, groups=12, level="plain").frames())
    answers, used = capsys.readouterr().out.splitlines()
    assert answers
    held, least = used.split(" <= ")
    assert 0 < int(held) <= int(least) == 4 << 20


def test_minnow(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stream: streams.Stream = run("docs/minnow.md")["stream"]
    assert capsys.readouterr().out.splitlines() == [f"{q.type} {q.text} {q.answer}" for q in stream.questions]
    assert sum(1 for _ in frames.open("clip.mp4")) == 128


def test_standing_questions(run: Any, film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("docs/standing-questions.md")["standing"].counts.answered == 4  # of 130 s
    assert "[30.0 s] None -> " in capsys.readouterr().out


def test_families(run: Any) -> None:
    assert run("docs/families.md")["Brook"].model_types == ("brook",)


def test_policies(run: Any) -> None:
    assert run("docs/policies/writing.md")["KeyDiff"]().name == "keydiff"


def test_recompute(run: Any) -> None:
    cell = torch.nn.GRUCell(4, 4)
    found = run(
        "docs/recompute/index.md",
        step=lambda x, state: (state := cell(x, state), state),
        inputs=torch.randn(20, 2, 4),
        x=torch.randn(2, 4),
        state=torch.zeros(2, 4),
        criterion=lambda outputs: outputs.square().sum(),
    )
    assert found["plan"].forwards >= 1000
    assert cell.weight_hh.grad is not None
    assert np.isfinite(cell.weight_hh.grad.numpy()).all()


def test_precision(run: Any, tmp_path: Path) -> None:
    text = " ".join(["which object was in the top-left when did it appear first and last where what colour"] * 20)
    (tmp_path / "text.txt").write_text(text)
    words = ["quantize", "minnow", "OUT", "--calibration", "text.txt", "-q", "--samples", "2", "--length", "32"]
    assert CliRunner().invoke(app, words).exit_code == 0
    samples = precision.samples_of(models.load("OUT", weights=False).tokenizer, text, samples=2, length=32)
    precision.calibrate("OUT", samples, [3.5, 4.0], quiet=True)
    assert run("docs/precision/index.md")["session"].plan.slots > 0
