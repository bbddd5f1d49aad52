"""A model family from another package, by entry point: it is loaded, listed, cannot take a built-in's place, and is told when broken."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from millpond import ModelError, Session
from millpond.cli import app
from millpond.models import Supported, adapt, load, supported
from millpond.models.registry import OUTSIDE
from tests.models.tiny import tiny

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one module on the path, with lines of entry points."""

    def install(code: str, *lines: str) -> None:
        site = tmp_path / "site"
        described = site / "brook-1.0.dist-info"
        described.mkdir(parents=True)
        (site / "brook.py").write_text(code)
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: brook\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text("\n".join(["[millpond.models]", *lines]))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "brook", raising=False)
        OUTSIDE.__dict__.pop("found", None)

    yield install  # type: ignore[misc]
    sys.modules.pop("brook", None)
    OUTSIDE.__dict__.pop("found", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a `model_type` that only the package knows."""
    family, folder = tiny("qwen2_5_vl"), tmp_path / "checkpoint"
    family.model.save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"qwen2_5_vl"', '"brook"'))
    # Under the model's own names: `save_pretrained` writes those that transformers translates for Qwen2.5-VL.
    weights = {name: weight.clone() for name, weight in family.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shown() -> str:
    """The family that docs/families.md shows."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_it_is_loaded_and_watches_like_a_built_in_one(install: Install, folder: Path) -> None:
    with pytest.raises(ModelError, match="brook"):
        load(folder)
    install(shown(), "brook = brook:Brook")
    family = load(folder)
    assert type(family).__name__ == "Brook"
    assert len(family.opening()) != len(tiny("qwen2_5_vl").opening())
    session = Session(family, budget="2MiB")
    session.feed((index / 2, np.full((56, 56, 3), 40 * index, np.uint8)) for index in range(6))
    assert session.ask("what?", max_new_tokens=2).text is not None
    assert session.usage.frames_seen == 6
    assert type(adapt(family.model, family.tokenizer)) is type(family)


def test_it_is_listed_behind_the_built_in_ones(install: Install) -> None:
    before = supported()
    install(shown(), "brook = brook:Brook")
    assert supported() == (*before, Supported("brook", "Brook", "Brook"))
    assert CliRunner().invoke(app, ["models"]).stdout.splitlines()[-1].split() == ["brook", "Brook"]
    with pytest.raises(ModelError, match=r"'bert' is not supported; there are: qwen2_vl, .*, brook"):
        adapt(type("Model", (), {"config": type("Config", (), {"model_type": "bert"})}), None)


def test_no_package_can_take_over_a_built_in_model_type(install: Install) -> None:
    before = supported()
    taking = shown().replace('("brook",)', '("brook", "qwen2_vl")')
    install(taking, "qwen2_vl = brook:Brook")
    assert supported() == before
    family = tiny("qwen2_vl")  # adapted anew
    assert type(family).__module__ == "millpond.models.qwen2_vl"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import no_such_package", "cannot be loaded: No module named 'no_such_package'"),
        ("raise RuntimeError('first\\nsecond')", "cannot be loaded: first$"),
        ("class Brook: model_types = ('brook',)", "is not a millpond Family"),
        (
            "from millpond.models.qwen2_5_vl import Qwen25VL as Brook",
            "must have this in its class attribute `model_types`",
        ),
        (
            "from millpond.models import Family\nclass Brook(Family): model_types = ('brook',)",
            "must have a class attribute `name`",
        ),
        (
            "from millpond.models import Family\nclass Brook(Family): name, model_types = 'Brook', ('brook',)",
            "must have a method 'assign_positions'",
        ),
    ],
)
def test_a_broken_one_is_told_in_one_line_and_breaks_nothing_else(
    install: Install, folder: Path, code: str, fault: str
) -> None:
    before = supported()
    install(code, "brook = brook:Brook")
    assert supported() == before
    with pytest.raises(ModelError, match=rf"the model family 'brook' \(brook:Brook\) {fault}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
