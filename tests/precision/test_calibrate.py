"""`millpond calibrate`: several targets in one file, real bytes under the limit, one line for every mistake."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from millpond import precision
from millpond.cli import app
from millpond.precision.calibration import Calibration
from millpond.precision.loading import stored_bytes
from tests.precision.models import text

FEW = ("--samples", 2, "--length", 16)


def calibrate(*words: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *(str(word) for word in words)], env={"COLUMNS": "160"})


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "model"))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(text(64), encoding="utf-8")
    return path


def minimum(result: Result) -> int:
    return int(result.stderr.partition("the minimum that works is ")[2].split()[0])


def test_targets_share_a_file_and_memory_is_kept(folder: Path, prose: Path) -> None:
    words = (folder, "--calibration", prose, *FEW, "--target-bits", 3.1, "--target-bits", 3.2)
    refused = calibrate(*words, "--memory", "1kB")
    assert refused.exit_code == 1
    assert refused.stderr.count("error: ") == 1
    memory = minimum(refused) + 20_000
    done = calibrate(*words, "--memory", memory)
    assert done.exit_code == 0, done.stderr
    assert "targets of 3.1, 3.2 bits" in done.stdout
    made = Calibration.load(folder)
    assert made is not None
    assert set(made.targets) == {3.1, 3.2}
    assert made.memory == memory
    model = precision.load(folder, memory=memory, target_bits=3.2)
    assert stored_bytes(model) <= memory
    model.set_target_bits(3.1)
    # No linear reads what its greatest bit-width, or a dropped table, does not hold.
    for choices in made.targets.values():
        assert all(choice.high <= made.max_bits[name] for name, choice in choices.items())


def test_quiet_says_nothing_on_stderr(folder: Path, prose: Path) -> None:
    done = calibrate(folder, "--calibration", prose, *FEW, "--target-bits", 3.5, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--target-bits": 7.5}, "a target must lie between 3 and 6"),
        ({"--target-bits": 2.0}, "a target must lie between 3 and 6"),
        ({"--length": 4096}, "at least 4096 are needed"),
        ({"--calibration": "nowhere.txt"}, "calibration text nowhere.txt cannot be read"),
        ({"--memory": "ninety"}, "cannot read 'ninety' as a size"),
    ],
)
def test_mistakes_are_one_line(folder: Path, prose: Path, change: dict[str, object], message: str) -> None:
    options = {"--calibration": prose, "--target-bits": 4.0, "--samples": 2, "--length": 16, **change}
    result = calibrate(folder, *(word for option in options.items() for word in option))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (folder / "calibration.json").exists()


def test_a_folder_without_a_model_is_told_at_once(tmp_path: Path, prose: Path) -> None:
    result = calibrate(tmp_path, "--calibration", prose, "--target-bits", 4)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path} holds no quantized model")
