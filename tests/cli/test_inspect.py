"""`millpond plan`, `doctor`, `models`, `policies`, and what every command has in common."""

import json
import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from millpond import Session, models, policies
from millpond.cli import app, health


def millpond(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})


def objects(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_plan_shows_the_session_s_own_split(model: str) -> None:
    words = ("plan", "--model", model, "--budget", "3MiB", "--size", "112x56", "--fps", 4)
    split = Session(models.load(model, device="cpu"), budget="3MiB").plan_for(56, 112)
    found = objects(millpond(*words, "--json"))
    assert {name: found[name] for name in split.to_dict()} == split.to_dict()
    assert found["total_bytes"] <= 3 * 2**20
    assert (found["width"], found["height"], found["fps"]) == (112, 56, 4)
    assert found["seconds_in_full"] == found["frames_in_full"] / 4
    shown = millpond(*words).stdout
    numbers = (
        split.memory_tokens,
        split.block_tokens,
        split.reserve_tokens,
        split.bytes_per_token,
        split.scratch_bytes,
    )
    for number in (*numbers, split.frames_in_full, split.total_bytes):
        assert str(number) in shown


def test_plan_shows_what_the_latest_frames_take(model: str) -> None:
    words = ("plan", "--model", model, "--budget", "3MiB", "--size", "112x56", "--recent-frames", 4)
    split = Session(models.load(model, device="cpu"), budget="3MiB", recent_frames=4).plan_for(56, 112)
    found, shown = objects(millpond(*words, "--json")), millpond(*words).stdout
    assert {name: found[name] for name in split.to_dict()} == split.to_dict()
    assert found["recent_bytes"] == 4 * found["waiting_bytes"] // (found["block_groups"] * found["frames_per_group"])
    assert str(split.recent_bytes) in shown
    assert "4 recent frames again" in shown
    assert "recent frames" not in millpond(*words[:-2]).stdout


@pytest.mark.parametrize("budget", ["1kB", "least for the prompt"])
def test_a_budget_too_small_names_the_least_and_that_works(model: str, budget: str) -> None:
    words = ("plan", "--model", model, "--size", "112x112")
    if budget != "1kB":
        # Enough for text alone, not for frames.
        family = models.load(model, device="cpu")
        with pytest.raises(Exception, match="minimum") as refused:
            Session(family, budget=1)
        budget = str(refused.value.minimum)  # type: ignore[attr-defined]
    result = millpond(*words, "--budget", budget)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: a budget of ")
    minimum = int(result.stderr.partition("the minimum that works is ")[2].split()[0])
    assert millpond(*words, "--budget", minimum).exit_code == 0
    assert millpond(*words, "--budget", minimum - 1).exit_code == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--size", "9" * 400 + "x9"),
        ("--size", "99999x99999"),
        ("--size", "wide"),
        ("--budget", "much"),
        ("--fps", "-1"),
    ],
)
def test_plan_with_what_cannot_be_read_is_exit_code_2(model: str, words: tuple[str, str]) -> None:
    assert millpond("plan", "--model", model, *words).exit_code == 2


def test_policies_are_all_listed_with_their_parameters() -> None:
    found = {row["name"]: row for row in objects(millpond("policies", "--json"))["policies"]}
    assert sorted(found) == sorted(policy.name for policy in policies.available())
    assert not found["full"]["capped"]
    shown = millpond("policies").stdout
    for name, row in found.items():
        assert name in shown
        assert list(row["parameters"]) == [field.name for field in fields(policies.get(name))]


def test_policies_fit_a_terminal_of_80_columns() -> None:
    lines = millpond("policies").stdout.splitlines()
    assert len(lines) == 2 * len(policies.available())


def test_models_lists_what_can_be_loaded() -> None:
    found = objects(millpond("models", "--json"))
    assert list(found["model_types"]) == [row.model_type for row in models.supported()]
    assert found["model_types"]["qwen2_5_vl"] == "Qwen2.5-VL"
    assert "LLaVA-OneVision" in millpond("models").stdout


def test_doctor_finds_what_is_needed_here() -> None:
    result = millpond("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    found = {check["what"]: check for check in objects(result)["checks"]}
    assert found["torch"]["good"]
    assert "h264" in found["decoders"]["found"]
    assert "infinipot-v" in found["policies"]["found"]
    assert found["extra plots"]["found"]
    assert "h264" in millpond("doctor").stdout


def test_doctor_says_whether_the_compiled_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> health.Check:
        return health._kernels()

    monkeypatch.setattr(health, "compiled", lambda source: (None, "no C++ compiler"))
    missing = check()
    assert (missing.good, missing.needed) == (False, False)
    assert "no C++ compiler; torch does its work" in missing.found
    monkeypatch.setattr(health, "compiled", lambda source: (object(), str(source)))
    monkeypatch.setattr("millpond.ops.best", lambda scores, slots: torch.tensor([[0, 1]]))
    assert check().needed


def test_doctor_fails_on_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from millpond import frames

    def broken(*_: object, **__: object) -> None:
        raise TypeError("open() got an unexpected keyword")

    monkeypatch.setattr(frames, "open", broken)
    result = millpond("doctor", "--json")
    assert result.exit_code == 1
    (found,) = [check for check in objects(result)["checks"] if check["what"] == "watching"]
    assert found["found"] == "it does not work: TypeError: open() got an unexpected keyword"


def test_doctor_knows_the_bounds_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = health.version
    monkeypatch.setattr(health, "version", lambda name: "9.0.0" if name == "av" else real(name))
    result = millpond("doctor")
    assert result.exit_code == 1
    assert re.search(r"av +missing +9\.0\.0, but it must be >=\d+", result.stdout)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "out/x.json"), SafetensorError("I/O error: full")]
)
def test_what_the_system_refuses_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from millpond.eval import streams

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(streams, "generate_any", full)
    result = millpond("bench", "accuracy", "--streams", 1)
    assert result.exit_code == 1
    assert result.stderr in (
        "error: out/x.json: No space left on device\n",
        "error: I/O error: full\n",
    )


def test_doctor_names_what_is_missing_and_tells_an_extra_from_a_need(monkeypatch: pytest.MonkeyPatch) -> None:
    real = health.version

    def version(package: str) -> str:
        if package in lacking:
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(health, "version", version)
    lacking = {"matplotlib"}
    result = millpond("doctor")
    assert result.exit_code == 0
    assert "pip install 'millpond[plots]' for matplotlib" in result.stdout
    lacking = {"accelerate"}
    result = millpond("doctor")
    assert result.exit_code == 1
    assert "pip install accelerate" in result.stdout


def test_no_command_is_a_usage_error_that_lists_them() -> None:
    result = millpond()
    assert result.exit_code == 2
    assert "watch" in result.output


@pytest.mark.parametrize("verb", ["watch", "plan", "doctor", "models", "policies", "demo"])
def test_every_command_explains_itself(verb: str) -> None:
    result = millpond(verb, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: {app.info.name} {verb} ") or f" {verb} " in result.stdout.splitlines()[0]


def test_a_sequence_whose_plan_would_take_minutes_is_refused() -> None:
    sizes = ("--hidden-bytes", "1KiB", "--internal-bytes", "1KiB", "--budget", "1MiB")
    result = millpond("recompute", "plan", "--length", 1_000_000_000, *sizes)
    assert result.exit_code == 2
    assert "1000000" in result.stderr


def test_shell_completion_is_offered() -> None:
    assert "--install-completion" in millpond("--help").stdout
