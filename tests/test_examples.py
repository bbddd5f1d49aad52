"""Every program in examples/ runs, on small numbers, and keeps what it promises."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millpond import Session, frames
from millpond.eval import streams

EXAMPLES = Path(__file__).parents[1] / "examples"
Main = Callable[..., list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    """The lines that an example prints."""

    def run(name: str, *given: Any, **more: Any) -> list[str]:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*given, **more)
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.mp4"
    streams.generate(7, groups=48, level="plain").write(path)
    return path


def bytes_in(line: str) -> tuple[int, int]:
    """What was used, and what was allowed."""
    used, allowed = re.findall(r"(\d+) of (\d+) bytes", line)[0]
    return int(used), int(allowed)


def test_every_example_is_short_named_in_the_readme_and_run_here() -> None:
    readme, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) == 7
    for path in programs:
        assert len(path.read_text().splitlines()) < 50
        assert f"examples/{path.name}" in readme
        assert f'run("{path.stem}"' in here


def test_a_file_is_watched(run: Main, film: Path) -> None:
    *answers, summary = run("watch_a_file", film)
    assert len(answers) == 2
    assert summary.startswith("96 frames")
    used, allowed = bytes_in(summary)
    assert used <= allowed == 512 << 10


def test_a_camera_is_asked_again_and_again(run: Main, film: Path) -> None:
    with frames.open(film, fps=2) as source:
        lines = run("watch_a_camera", source, every=10.0)
    assert [line.split(" s]")[0] for line in lines] == ["[10.0", "[20.0", "[30.0", "[40.0"]
    assert all(re.search(r"\] \w+, (changed|same) \(", line) for line in lines)
    assert all(int(re.findall(r"\((\d+) bytes", line)[0]) <= 256 << 10 for line in lines)


def test_a_killed_process_goes_on(run: Main, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("go_on_after_a_crash", film, tmp_path / "plain")
    saves, save = [], Session.save

    def killed(session: Session, path: Path) -> None:
        if len(saves) == 3:
            raise KeyboardInterrupt
        saves.append(path)
        save(session, path)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run("go_on_after_a_crash", film, tmp_path / "killed")
    capped = run("go_on_after_a_crash", film, tmp_path / "killed")
    assert plain[0] == "0 frames were seen before"
    assert capped[-2] == "30 frames were seen before"
    assert capped[-1] == plain[-1]
    assert plain[-1].startswith("96 frames: ")


def test_many_streams_share_one_number_of_bytes(run: Main, film: Path, tmp_path: Path) -> None:
    films = [film, *(tmp_path / f"{number}.mp4" for number in range(2))]
    for other in films[1:]:
        other.write_bytes(film.read_bytes())
    *answers, summary = run("watch_many_streams", *films)
    assert len(answers) == 6
    assert len({line.split()[-1] for line in answers[:3]}) == 1  # the same film, the same answer
    used, allowed = bytes_in(summary)
    assert used <= allowed == 1152 << 10
    assert int(summary.split()[-3]) > 0


def test_an_own_policy_keeps_the_budget(run: Main) -> None:
    own, default = run("own_policy", seconds=48)
    assert own.startswith("loudest: ")
    assert default.startswith("infinipot-v: ")
    assert all(int(line.split()[-2]) <= 256 << 10 for line in (own, default))


def test_generate_runs_past_the_cap(run: Main) -> None:
    tokens, used = run("generate_with_a_cap", length=60)
    went_by, stored = map(int, re.findall(r"\d+", tokens))
    assert went_by == 79
    assert stored < went_by
    assert bytes_in(used)[0] <= bytes_in(used)[1] == 64 << 10


def test_training_stays_in_the_budget_and_learns(run: Main) -> None:
    plan, *losses = run("train_in_a_budget", steps=60, updates=3)
    used, plain = bytes_in(plan)
    assert used <= plain // 20
    values = [float(line.split()[-1]) for line in losses]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
