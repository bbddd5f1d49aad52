"""One budget for weights, stream and workspace: what the plan says is what a session on that device takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from millpond import BudgetError, Session, SessionConfig, minnow, models, precision
from millpond.cli import app
from millpond.device import minimum_budget, plan_device
from millpond.errors import ModelError, PrecisionError
from millpond.eval.streams import generate
from millpond.precision.loading import stored_bytes
from tests.nightly import nightly
from tests.session.measure import held_bytes, transient_peak

SIZE = {"frame_size": (64, 64)}
TEXT = " ".join(["which object was in the top-left when did it appear first and last where what colour"] * 20)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Minnow in nested bit planes, written by the command line; not to be written to."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "text.txt").write_text(TEXT)
    words = ["quantize", "minnow", str(folder / "model"), "--calibration", str(folder / "text.txt"), "-q"]
    result = CliRunner().invoke(app, [*words, "--samples", "2", "--length", "32"])
    assert result.exit_code == 0, result.output
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("memory", nightly(["6448KiB", "8MiB", "11MiB"], but=["8MiB"]))
@pytest.mark.parametrize("policy", ["infinipot-v", "h2o"])
def test_everything_together_stays_on_the_device(quantized: Path, memory: str, policy: str) -> None:
    whole = int(memory.removesuffix("KiB").removesuffix("MiB")) * (1024 if "K" in memory else 1 << 20)
    planned = plan_device(
        models.load(quantized, weights=False), quantized, memory, (64, 64), SessionConfig(policy=policy)
    )
    session = Session.from_pretrained(quantized, device_memory=memory, policy=policy, **SIZE)
    assert session.plan_for(64, 64) == planned.plan
    split = planned.split
    assert split.weights + split.kv + split.workspace == whole == split.device
    assert planned.plan.total_bytes <= split.kv == planned.plan.budget
    weights = stored_bytes(session.family.model)
    rotary = sum(buffer.nbytes for name, buffer in session.family.model.named_buffers() if "rotary" in name)
    assert weights - rotary == split.weights
    frames = list(generate(3, groups=64, level="plain", split="train").frames())
    session.feed(frames[:60])
    peak = max(
        transient_peak(lambda: session.feed(frames[60:])),
        transient_peak(lambda: session.ask("which object was in the top-left ?", max_new_tokens=4)),
    )
    assert session.usage.compactions > 0
    # What the allocator saw come counts in full, also what is part of the stream's own scratch.
    assert weights + held_bytes(session) + peak <= whole


def test_more_memory_first_widens_the_weights_then_the_stream(quantized: Path) -> None:
    family = models.load(quantized, weights=False)
    splits = [
        plan_device(family, quantized, size << 20, (64, 64), SessionConfig()).split for size in (6, 7, 8, 10, 14, 66)
    ]
    assert [split.bits for split in splits] == sorted(split.bits for split in splits if split.bits)
    assert splits[0].bits < splits[-1].bits == 8  # type: ignore[operator]
    assert [split.kv for split in splits] == sorted(split.kv for split in splits)
    assert splits[-1].kv > splits[0].kv * 4


def test_a_plain_model_takes_its_own_weights_and_the_least_is_named() -> None:
    family = models.load("minnow", weights=False)
    bare, loaded = (
        plan_device(one, None, "10MiB", (64, 64), SessionConfig()).split for one in (family, models.load("minnow"))
    )
    assert bare == loaded
    assert bare.weights == stored_bytes(models.load("minnow").model)
    assert bare.bits is None
    with pytest.raises(BudgetError, match="the minimum that works is") as caught:
        Session.from_pretrained("minnow", device_memory="1MiB", **SIZE)
    minimum = caught.value.minimum
    assert minimum is not None
    session = Session.from_pretrained("minnow", device_memory=minimum, **SIZE)
    assert session.plan_for(64, 64).budget == minimum_budget(family, family.grid(64, 64), SessionConfig())
    with pytest.raises(BudgetError, match=f"the minimum that works is {minimum} bytes"):
        Session.from_pretrained("minnow", device_memory=minimum - 1, **SIZE)
    loaded_family = models.load("minnow")
    parts = (loaded_family.model, loaded_family.tokenizer)  # without the processor's numbers frames are larger
    assert Session.from_pretrained(parts, device_memory="40MiB", **SIZE).plan_for(64, 64).budget


def test_bits_are_chosen_per_request_on_a_running_session(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in quantized.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = models.load(quantized, weights=False).tokenizer
    samples = precision.samples_of(tokenizer, TEXT, samples=2, length=32)
    precision.calibrate(folder, samples, [3.5, 4.5], quiet=True)
    session = Session.from_pretrained(folder, device_memory="11MiB", target_bits=3.5, **SIZE)
    session.feed(list(generate(3, groups=16, level="plain", split="train").frames()))
    before = session.memory()
    for bits in (3.5, 4.5):
        session.family.model.set_target_bits(bits)
        session.ask("which object was in the top-left ?", max_new_tokens=4)
        assert 3 <= session.family.model.effective_bits() <= 6
    assert all((one.seconds == other.seconds).all() for one, other in zip(before, session.memory(), strict=True))
    with pytest.raises(PrecisionError, match=r"there are: 3\.5, 4\.5"):
        Session.from_pretrained(folder, budget="1MiB", target_bits=4)


def test_eight_bits_answer_as_the_model_itself(quantized: Path) -> None:
    plain, quantized = (Session.from_pretrained(model, budget="1MiB") for model in ("minnow", quantized))
    stream = generate(5, groups=32, level="plain", split="train")
    frames = list(stream.frames())
    for session in (plain, quantized):
        session.feed(frames)
    asked = [question for question in stream.questions if question.earlier is None]
    same = [
        plain.ask(one.text, max_new_tokens=4).text == quantized.ask(one.text, max_new_tokens=4).text for one in asked
    ]
    assert sum(same) >= len(same) - 1


def test_the_command_line_shows_the_split(quantized: Path) -> None:
    words = ["plan", "--model", str(quantized), "--device-memory", "8MiB", "--size", "64x64"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    device = found["device"]
    assert device["weights"] + device["kv"] + device["workspace"] == device["device"] == 8 << 20
    assert found["budget"] == device["kv"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "160"}).stdout
    assert f"every linear read at {device['bits']} bits" in shown
    assert str(device["workspace"]) in shown


def test_what_cannot_be_is_refused_in_one_line(quantized: Path) -> None:
    with pytest.raises(BudgetError, match="not both"):
        Session.from_pretrained("minnow", budget="1MiB", device_memory="8MiB")
    with pytest.raises(BudgetError, match="has no cap"):
        Session.from_pretrained("minnow", device_memory="8MiB", policy="full")
    with pytest.raises(ModelError, match="not quantized"):
        Session.from_pretrained("minnow", budget="1MiB", target_bits=4)
    with pytest.raises(ModelError, match="the dtype of a quantized model"):
        Session.from_pretrained(quantized, budget="1MiB", dtype="bfloat16")
    result = CliRunner().invoke(app, ["plan", "--budget", "1MiB", "--device-memory", "8MiB"])
    assert result.exit_code == 2
    assert "not both" in result.stderr


def test_minnow_is_where_the_command_line_looked_for_it(quantized: Path) -> None:
    numbers = json.loads((minnow.folder() / "preprocessor_config.json").read_text())
    assert json.loads((quantized / "preprocessor_config.json").read_text()) == numbers
    assert models.load(quantized, weights=False).grid(480, 640) == models.load("minnow").grid(480, 640)
    assert (
        replace(models.load(quantized, weights=False).geometry, dtype=torch.float32) == models.load("minnow").geometry
    )
