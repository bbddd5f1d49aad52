"""The authors' InfiniPot-V on Minnow's weights, as a worker of bench/authors/compare.py. Runs in their environment, without millpond.

Their program is not shipped: the first argument is a checkout of it (bench/README.md says how to get one), and what runs is its own block
loop, its own compression and its own generation. Only what it does not need on this model is kept away: flash attention, video decoding
and data sets. Reads one request a line from stdin, writes one answer a line to stdout, both JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# Imported by the program's files and not used in what runs here.
_UNUSED = {
    "qwen_vl_utils": ("process_vision_info",),
    "datasets": ("load_dataset",),
    "decord": ("VideoReader", "cpu"),
    "tqdm": ("tqdm",),
}


def their_evaluator(checkout: Path) -> type:
    """The class of the program that watches a video block by block."""
    for name, members in _UNUSED.items():
        stub = ModuleType(name)
        stub.__dict__.update(dict.fromkeys(members))
        sys.modules.setdefault(name, stub)
    sys.path.insert(0, str(checkout))
    from qwen_inference_ovu import OfflineVideoEval

    return OfflineVideoEval


def load(folder: Path) -> Any:
    """Minnow's weights in this release of transformers, which names the rotary settings in its own way."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope["rope_theta"]
    config["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"].pop("rope_parameters")
    made = Qwen2_5_VLConfig(**config)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, config=made, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


class Video:
    """One stream in their program: watched once, then asked any number of questions behind copies of the cache.

    Args:
        evaluator: their class. model: loaded.
        file: what compare.py wrote: patches, grid, features, opening and questions.
        block, kept: frame groups that the cache holds before and after a compression.
    """

    def __init__(self, evaluator: type, model: Any, file: Path, block: int, kept: int) -> None:
        self.file = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
        self.program = object.__new__(evaluator)
        self.program.model = model
        self.program.processor = SimpleNamespace(tokenizer=Words(int(model.config.text_config.eos_token_id)))
        self.program.verbose, self.program.per_frame, self.program.adaptive_pooling = False, False, False
        self.program.block_size, self.program.compress_frame_num = block, kept
        self.program.compression_method, self.program.tar_ratio, self.program.query_ratio = "infinipot-v", 0.5, 0.25
        self.model = model

    def prompt(self, question: torch.Tensor) -> torch.Tensor:
        """int64 [1, n]: opening, one placeholder a vision token, question."""
        video = torch.full((len(self.file["features"]),), self.model.config.video_token_id)
        return torch.cat([self.file["opening"], video, question])[None]

    def watch(self, question: torch.Tensor, *, seen: bool) -> tuple[DynamicCache, float]:
        """The cache after all blocks, and processor seconds; with `seen` the vision tower has looked already."""
        ids, grid = self.prompt(question), self.file["grid"]
        opening, groups = len(self.file["opening"]), int(grid[0, 0])
        a_group = len(self.file["features"]) // groups
        inputs = {"input_ids": ids, "pixel_values_videos": self.file["patches"], "video_grid_thw": grid}
        sizes = opening, len(question), a_group, len(self.file["features"]), groups
        with features_at_hand(self.program, self.file["features"], a_group, seen):
            began = process_time()
            cache, _ = self.program._block_wise_prefill(inputs, ids, DynamicCache(), *sizes)
            return cache, process_time() - began

    def answer(self, cache: DynamicCache, question: torch.Tensor, *, corrected: bool) -> list[int]:
        """Token ids of the answer; the question stands where the prompt has it only when `corrected`, else its length further on."""
        ids = self.prompt(question)
        positions, _ = self.model.model.get_rope_index(ids, video_grid_thw=self.file["grid"])
        copy = DynamicCache()
        for index, layer in enumerate(cache.layers):
            copy.update(layer.keys, layer.values, index)
        if corrected:
            # It begins behind the last entry that it is given, which is the whole prompt's.
            positions = positions[:, :, -len(question), None] - 1
        out: list[int] = self.program._generation_stage({"input_ids": ids}, copy, positions)
        return out


class Words:
    """Stands for the tokenizer, whose words compare.py knows: an answer stays token ids."""

    def __init__(self, end: int) -> None:
        self.eos_token_id = end

    def decode(self, ids: torch.Tensor, **_: Any) -> list[int]:
        return [int(token) for token in ids]


@contextmanager
def features_at_hand(program: Any, features: torch.Tensor, a_group: int, seen: bool) -> Iterator[None]:
    """Where the vision tower has looked already, its features take the place of its forward."""
    if seen:
        program._visual_encoding_block = lambda _pixels, _grid, first, last, _all: features[
            first * a_group : last * a_group
        ]
    try:
        yield
    finally:
        program.__dict__.pop("_visual_encoding_block", None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    replies, sys.stdout = sys.stdout, sys.stderr  # the program prints
    evaluator, model = their_evaluator(args.checkout), load(args.weights)
    evaluator.MAX_GEN_TOKENS = 4  # as many as are asked of ours
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        video = Video(evaluator, model, Path(asked["file"]), asked["block"], asked["kept"])
        questions = [video.file[name] for name in sorted(video.file) if name.startswith("question")]
        cache, seconds = video.watch(questions[0], seen=asked["seen"])
        said = {
            name: [video.answer(cache, question, corrected=name == "corrected") for question in questions]
            for name in asked["answers"]
        }
        print(json.dumps({"seconds": seconds, "answers": said}), file=replies, flush=True)


if __name__ == "__main__":
    main()
