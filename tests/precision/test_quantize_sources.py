"""What `millpond quantize` is given to quantize: a stranger's folder that is broken is one line, and nothing is written."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from millpond.cli import app
from tests.precision.models import text, text_model, tokenizer


def incomplete(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def huge(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 500}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "no tokenizer at"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "rope_parameters": 3}'), "cannot"),
        (huge, "its files hold"),
        (incomplete, "the weights are incomplete: 1 are missing, first model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_broken_source_is_one_line(tmp_path: Path, broken: object, message: str) -> None:
    folder, prose = tmp_path / "model", tmp_path / "prose.txt"
    text_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    prose.write_text(text(64), encoding="utf-8")
    broken(folder)  # type: ignore[operator]
    words = ["quantize", str(folder), str(tmp_path / "out"), "--calibration", str(prose), "--samples", "2", "--length"]
    result = CliRunner().invoke(app, [*words, "16"], env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
