"""Train Minnow from nothing: `python -m training.minnow.train --run runs/minnow`.

Three stages, each resumable and logged (RUN/sight.jsonl, codes.jsonl, streams.jsonl):

1. sight: the vision tower learns what every cell of a group shows, half of the groups through H.264;
2. codes: the language model learns to answer from codes, what a faultless tower would put out, from short streams to long ones;
3. streams: the language model, tower frozen, on drawn streams through H.264, in turn with codes; the rate falls to 0.

Stages 1 and 2 do not depend on each other, so they may run at the same time (`--stage sight`, `--stage codes`). Every step draws
from a generator of (seed, stage, step), so a stopped run goes on as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from training.minnow.architecture import IMAGE_NUMBERS, Codes, configuration, match_words, name_words, tokenizer
from training.minnow.curriculum import LESSONS, MORE_WEIGHTS, TYPE_WEIGHTS, coded_batch, pick, stream_batch
from training.minnow.language import answer_loss, layout
from training.minnow.loop import Stage, train
from training.minnow.sight import features, sight_batch, sight_loss

__all__ = ["build", "export", "main", "stages"]

STEPS = {"sight": 1600, "codes": 1700, "streams": 300}
_RAMP = 2500
"""Steps over which stage 2 goes from short streams to long ones."""
_MORE = 1208
"""The step of stage 2 from which the harder question types are practised too."""
_SIGHT_GROUPS = 32


def build(seed: int) -> Any:
    """The untrained model; the same seed gives the same weights.

    transformers draws weights with a standard deviation of 0.02, which is little for a width of 128; the language model's are widened.
    Words for things that can be seen start as the codes of those things, and the first layer by matching like with like.
    """
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(configuration())
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.ndim == 2:
                into_residual = "o_proj" in name or "down_proj" in name
                weight.mul_(2.5 if "embed" in name else 1.5 if into_residual else 3.0)
    language, codes = model.model.language_model, Codes.make()
    name_words(language.embed_tokens, tokenizer(), codes)
    match_words(language.layers[0].self_attn, codes)
    return model


def stages(model: Any, steps: dict[str, int]) -> dict[str, Stage]:
    """The three stages, in order."""
    codes, chat = Codes.make(), layout(tokenizer())
    tower, language = model.model.visual, model.model.language_model

    def see(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, labels = sight_batch(rng, _SIGHT_GROUPS)
        return sight_loss(features(tower, pixels), labels, codes)

    def answer(rng: np.random.Generator, step: int, *, drawn: bool, more: bool) -> tuple[Tensor, dict[str, float]]:
        weights = MORE_WEIGHTS if more else TYPE_WEIGHTS
        if drawn:
            batch = stream_batch(rng, tower, weights)
        else:
            batch = coded_batch(rng, pick(rng, LESSONS, min(1.0, step / _RAMP)), codes, weights)
        loss, right = answer_loss(model, chat, batch)
        scores: dict[str, list[float]] = defaultdict(list)
        for row, marks in zip(batch.questions, right, strict=True):
            for question, mark in zip(row, marks, strict=True):
                scores[question.type].append(float(mark))
        return loss, {kind: sum(marks) / len(marks) for kind, marks in scores.items()}

    def from_codes(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        return answer(rng, step, drawn=False, more=step >= _MORE)

    def from_streams(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        return answer(rng, _RAMP, drawn=step % 2 == 0, more=False)

    return {
        "sight": Stage("sight", 1, tower, [*tower.parameters()], see, steps["sight"], 1.5e-3, decay=0.25),
        "codes": Stage("codes", 2, language, [*language.parameters()], from_codes, steps["codes"], 1e-3, decay=0.0),
        "streams": Stage(
            "streams", 3, language, [*language.parameters()], from_streams, steps["streams"], 7e-4, decay=1.0
        ),
    }


def export(model: Any, folder: Path) -> None:
    """Write what `from_pretrained` reads: config, float32 safetensors, tokenizer with chat template, preprocessor numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_NUMBERS, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--run", type=Path, default=Path("runs/minnow"), help="folder for checkpoints, logs and the result"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage", choices=[*STEPS], help="only this stage; by default all, then the export to RUN/weights"
    )
    for name, count in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=count)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread changes the order of sums, and with it the result
    model = build(arguments.seed)
    made = stages(model, {name: getattr(arguments, f"{name}_steps") for name in STEPS})
    for name, stage in made.items():
        if arguments.stage in (None, name):
            if name == "streams":
                for earlier in ("sight", "codes"):
                    train(made[earlier], arguments.run, arguments.seed)
                for weight in model.model.visual.parameters():
                    weight.requires_grad_(False)
            train(stage, arguments.run, arguments.seed)
    if arguments.stage in (None, "streams"):
        export(model, arguments.run / "weights")


if __name__ == "__main__":
    main()
