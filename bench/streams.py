"""Streams of real pixels: what guessing is worth, how separable events are in a model's keys and values, how fast frames are drawn.

    OMP_NUM_THREADS=1 python bench/streams.py --out bench/results/streams.json --png docs/accuracy/streams.png

Per level (today's drawn ones too, for the separability):

- blind: right answers of who guesses at random, always gives a type's most frequent answer (both learned on as many streams of
  the training split), or knows the last four frames; per question type, at two lengths. `derivable` is the share of the stored answers
  that a second reading of the frame-by-frame table of what shows also gives: the upper bound.
- separability: one threshold on one number a token, events against background, as the area under the ROC curve (0.5: none),
  mean over streams. Numbers: how far the token's key (before rotation) or value lies from the mean of its stream's, how far its key lies
  from that of the same place a group before, and the length of its value; the best layer and the first. A token shows an event when an
  event's box covers at least a quarter of it.
- frames a second on one core, pixels in memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from time import process_time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from millpond import Session, models
from millpond.eval.hardware import describe
from millpond.eval.streams import LEVELS, VIDEO_LEVELS, Stream, VideoStream, generate_any, generate_video
from millpond.eval.streams.events import label_grid
from millpond.eval.streams.video.baselines import blind
from millpond.eval.streams.video.drawing import placed
from millpond.eval.streams.video.timeline import derived
from millpond.models.base import Family

NUMBERS = ("key_from_mean", "key_from_before", "value_from_mean", "value_length")


def baselines(level: str, groups: int, streams: int) -> dict[str, object]:
    asked = [
        (s, q)
        for s in (generate_video(seed, groups=groups, level=level) for seed in range(streams))
        for q in s.questions
    ]
    learned = [
        question
        for seed in range(streams)
        for question in generate_video(seed, groups=groups, level=level, split="train").questions
    ]
    rows = blind([question for _, question in asked], learned)
    right = sum(derived(stream, question) == question.answer for stream, question in asked)
    return {
        "derivable": right / len(asked),
        "types": {
            kind: {name: round(value, 4) for name, value in asdict(row).items()} for kind, row in sorted(rows.items())
        },
    }


def shows_event(stream: Stream | VideoStream, rows: int, columns: int) -> NDArray[np.bool_]:
    """Which tokens show an event: bool [groups, rows * columns]."""
    if isinstance(stream, Stream):
        drawn: NDArray[np.bool_] = label_grid(stream.events, stream.groups)[..., 0] >= 0
        return drawn
    edge = VIDEO_LEVELS[stream.level].edge
    covered = np.zeros((stream.frame_count, edge, edge), dtype=bool)
    for frame in range(stream.frame_count):
        for event in stream.showing(frame):
            box, (height, width) = placed(event, frame, edge), event.box
            covered[frame, max(box.top, 0) : box.top + height, max(box.left, 0) : box.left + width] = True
    token = covered.reshape(stream.groups, 2, rows, edge // rows, columns, edge // columns).mean((3, 5)).max(1)
    return token.reshape(stream.groups, -1) >= 0.25


@contextmanager
def projections(family: Family, ends: str) -> Iterator[list[list[Tensor]]]:
    """What the decoder's layers project to keys or values while this is open, before rotation: a list per layer of [tokens, width]."""
    modules = [module for name, module in family.model.named_modules() if name.endswith(f"self_attn.{ends}")]
    seen: list[list[Tensor]] = [[] for _ in modules]

    def noting(index: int) -> object:
        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            seen[index].append(output[0].detach().float().clone())

        return note

    handles = [module.register_forward_hook(noting(index)) for index, module in enumerate(modules)]  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def numbers(keys: Tensor, values: Tensor, tokens: int) -> dict[str, Tensor]:
    """One number a token from [n, width] keys and values, each float32 [n]."""

    def off(a: Tensor, b: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(a, b, dim=-1)

    before = torch.cat([keys[:tokens], keys[:-tokens]])
    return {
        "key_from_mean": off(keys, keys.mean(0, keepdim=True)),
        "key_from_before": off(keys, before),
        "value_from_mean": off(values, values.mean(0, keepdim=True)),
        "value_length": values.norm(dim=-1),
    }


def area(score: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, by ranks (ties share theirs)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    yes, no = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


def separability(family: Family, level: str, groups: int, streams: int) -> dict[str, object]:
    found: dict[str, list[list[float]]] = {name: [] for name in NUMBERS}
    share = []
    for seed in range(streams):
        stream = generate_any(seed, groups=groups, level=level)
        frames = list(stream.frames())
        grid = family.grid(*frames[0][1].shape[:2])
        positive = shows_event(stream, grid.rows, grid.cols).ravel()
        share.append(float(positive.mean()))
        session = Session(family, policy="full")
        with projections(family, "k_proj") as keys, projections(family, "v_proj") as values, torch.inference_mode():
            session.feed(frames)
            session.ask("Which object appeared first?", max_new_tokens=1)  # what waits goes in
        opening = session.plan.prompt_tokens
        span = slice(opening, opening + groups * grid.tokens)
        layers = [
            numbers(torch.cat(k)[span], torch.cat(v)[span], grid.tokens) for k, v in zip(keys, values, strict=True)
        ]
        for name in NUMBERS:
            found[name].append([area(layer[name].numpy(), positive) for layer in layers])
    areas = {name: np.mean(rows, axis=0) for name, rows in found.items()}
    return {
        "event_tokens": round(float(np.mean(share)), 4),
        "area": {
            name: {"first_layer": round(float(a[0]), 4), "best_layer": round(float(a.max()), 4)}
            for name, a in areas.items()
        },
    }


def picture(path: Path) -> None:
    """A row for each level of real pixels: of eight streams of the training split the frame in which most shows, 64 pixels doubled."""
    rows = []
    for level in VIDEO_LEVELS:
        tiles = []
        for seed in range(8):
            stream = generate_video(seed, groups=64, level=level, split="train")
            fullest = max(
                range(stream.frame_count), key=lambda frame: sum(e.box[0] * e.box[1] for e in stream.showing(frame))
            )
            _, frame = next(islice(stream.frames(), fullest, None))
            scale = 128 // frame.shape[0]
            tiles.append(frame.repeat(scale, 0).repeat(scale, 1))
        rows.append(np.concatenate(tiles, axis=1))
    Image.fromarray(np.concatenate(rows)).quantize(256, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def speed(level: str, frames: int) -> float:
    """Frames a second of processor time on one core, the median of five streams, grounds loaded before."""
    rates = []
    for seed in range(5):
        stream = generate_any(seed, groups=frames // 2, level=level, split="train")
        for _ in stream.frames():
            pass
        began = process_time()
        for _ in stream.frames():
            pass
        rates.append(frames / (process_time() - began))
    return round(float(np.median(rates)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="minnow")
    parser.add_argument("--streams", type=int, default=200, help="for the baselines")
    parser.add_argument("--watched", type=int, default=12, help="streams that the model watches")
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--levels", nargs="+", default=[*LEVELS, *VIDEO_LEVELS])
    parser.add_argument("--png", type=Path, help="also draw frames of each level of real pixels")
    options = parser.parse_args()
    if options.png:
        picture(options.png)
    torch.set_num_threads(1)
    family = models.load(options.model)
    rows: dict[str, dict[str, object]] = {}
    for level in tqdm(options.levels):
        rows[level] = {
            "separability": separability(family, level, options.groups[0], options.watched),
            "frames_a_second": speed(level, 2 * options.groups[0]),
        }
        if level in VIDEO_LEVELS:
            rows[level]["blind"] = {str(groups): baselines(level, groups, options.streams) for groups in options.groups}
    result = {
        "what": "streams of each level: guessing, separability of events in keys and values, drawing speed",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; frames a second are of processor time",
        "command": "OMP_NUM_THREADS=1 python bench/streams.py --out bench/results/streams.json --png docs/accuracy/streams.png",
        "streams": options.streams,
        "watched": options.watched,
        "groups": options.groups,
        "levels": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
