"""The checkpoint in the package: loads as any Qwen2.5-VL, is small, answers, and its card tells what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from millpond import minnow, models
from millpond.errors import ModelError
from millpond.eval.streams import generate
from millpond.minnow import SUPPORTED, checkpoint
from training.minnow.architecture import configuration, tokenizer
from training.minnow.evaluate import evaluate

CARD = Path(__file__).parents[2] / "bench" / "results" / "minnow_card.json"


def test_transformers_loads_it_as_any_other_model() -> None:
    folder = minnow.folder()
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2_5_vl"
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer().get_vocab()


def test_it_is_small_and_of_the_shape_that_the_script_trains() -> None:
    folder = minnow.folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    stored, made = AutoConfig.from_pretrained(folder), configuration()
    assert stored.text_config.rope_parameters["mrope_section"] == made.text_config.rope_parameters["mrope_section"]
    assert stored.vision_config.tokens_per_second == made.vision_config.tokens_per_second
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("through_mp4", [False, True])
def test_it_answers_about_streams_of_the_test_split(through_mp4: bool) -> None:
    family = models.load(minnow.folder())
    streams = [generate(seed) for seed in range(900, 903)]
    overall = evaluate(family, streams, through_mp4=through_mp4)["all"]
    assert overall.asked >= 21
    assert overall.share >= 0.75


def test_the_card_and_the_log_tell_what_was_measured() -> None:
    text = (minnow.folder() / "README.md").read_text(encoding="utf-8")
    card = json.loads(CARD.read_text(encoding="utf-8"))
    for way in ("raw", "mp4"):
        table = card["accuracy"]["standard"][way]
        assert set(table) == {*SUPPORTED, "all"}
        for accuracy in table.values():
            assert f"{accuracy['share']:.3f} ({accuracy['low']:.3f}-{accuracy['high']:.3f})" in text
    rows = [json.loads(line) for line in (minnow.folder() / "training.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"sight", "codes", "streams"}


def test_without_weights_the_folder_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    with pytest.raises(ModelError, match="training/minnow"):
        minnow.folder()


def test_it_knows_the_size_of_the_streams_drawings() -> None:
    from millpond.eval.streams.drawing import EDGE
    from millpond.minnow.familiar import familiar

    picture = np.random.default_rng(0).integers(0, 8, (EDGE, EDGE, 1), dtype=np.uint8).repeat(3, axis=2) << 5
    assert familiar(picture)
    assert not familiar(picture[1:])
