"""What the language model practises at each step: lengths, evictions, question types. Knows nothing about optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from millpond.eval.streams import generate
from millpond.eval.streams.drawing import CELLS, LEVELS
from millpond.eval.streams.events import Event, label_grid, plan
from millpond.eval.streams.questions import Question, ask
from training.minnow.architecture import Codes
from training.minnow.language import Asked, keep_tokens
from training.minnow.sight import features, patches, round_trip

__all__ = ["LESSONS", "MORE_WEIGHTS", "TYPE_WEIGHTS", "Lesson", "coded_batch", "pick", "stream_batch"]

TYPE_WEIGHTS = {
    "colour": 1.0,
    "object": 1.2,
    "where": 1.0,
    "appear": 0.6,
    "digit": 0.6,
    "first": 1.0,
    "last": 1.0,
    "now": 0.8,
}
"""The question types that are practised from the start, and how often."""
MORE_WEIGHTS = {**TYPE_WEIGHTS, "before": 1.0, "after": 1.0, "count": 0.8, "when": 0.8}
"""What is practised once those are learned."""
_STREAM_QUESTIONS = 20
_STREAM_SEEDS = 1 << 31


@dataclass(frozen=True)
class Lesson:
    """One length of stream.

    Attributes:
        groups: length in temporal groups (seconds).
        tokens: vision tokens kept of each stream, at most groups x 16.
        streams: streams a step.
        asked: questions a stream.
        share: weight with which a step picks this lesson, as a function of the share of the stage that is done: weights at
            the start and at the end, linear between them.
    """

    groups: int
    tokens: int
    streams: int
    asked: int
    share: tuple[float, float]


LESSONS = (
    Lesson(4, 64, 10, 6, (1.0, 0.05)),
    Lesson(8, 96, 8, 8, (1.0, 0.3)),
    Lesson(16, 96, 7, 8, (0.3, 0.8)),
    Lesson(32, 128, 6, 10, (0.1, 0.8)),
    Lesson(64, 192, 5, 12, (0.0, 1.0)),
    Lesson(64, 1024, 1, 16, (0.0, 0.15)),
)


def pick(rng: np.random.Generator, lessons: Sequence[Lesson], done: float) -> Lesson:
    """The lesson of one step; `done` is the share of the stage that lies behind, 0 to 1."""
    weights = np.array([lesson.share[0] * (1 - done) + lesson.share[1] * done for lesson in lessons])
    return lessons[int(rng.choice(len(lessons), p=weights / weights.sum()))]


def questions(
    rng: np.random.Generator, events: Sequence[Event], groups: int, count: int, weights: Mapping[str, float]
) -> list[Question]:
    """Questions about one stream, types drawn by weight (those that it has a question of)."""
    names = list(weights)
    share = np.array([weights[name] for name in names])
    share = share / share.sum()
    found: list[Question] = []
    while len(found) < count:
        question = ask(rng, events, groups, names[int(rng.choice(len(names), p=share))])
        if question is not None:
            found.append(question)
    return found


def coded_batch(rng: np.random.Generator, lesson: Lesson, codes: Codes, weights: Mapping[str, float]) -> Asked:
    """Streams as codes, without pixels, some tokens evicted where the lesson keeps fewer than there are."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    video, groups, cells, asked = [], [], [], []
    levels = list(LEVELS.values())
    for _ in range(lesson.streams):
        events = plan(rng, lesson.groups, levels[int(rng.integers(len(levels)))], "train")
        grid = label_grid(events, lesson.groups)
        kept = keep_tokens(rng, grid[..., 0] >= 0, lesson.tokens)
        group, cell = np.divmod(kept, CELLS)
        labels = torch.from_numpy(grid[group, cell])
        made = codes.at(labels, torch.from_numpy(cell))
        noise = float(rng.uniform(0.01, 0.06))
        video.append(made + noise * torch.randn(made.shape, generator=generator))
        groups.append(torch.from_numpy(group))
        cells.append(torch.from_numpy(cell))
        asked.append(questions(rng, events, lesson.groups, lesson.asked, weights))
    return Asked(torch.stack(video), torch.stack(groups), torch.stack(cells), asked)


def stream_batch(rng: np.random.Generator, tower: Any, weights: Mapping[str, float]) -> Asked:
    """One drawn stream of the train split as the frozen tower sees it, mostly through H.264, whole or with tokens evicted."""
    length = int(rng.choice([32, 64, 64, 64]))
    level = list(LEVELS)[int(rng.integers(len(LEVELS)))]
    stream = generate(int(rng.integers(_STREAM_SEEDS)), groups=length, level=level, split="train")
    frames = np.stack([pixels for _, pixels in stream.frames()])
    if rng.random() < 0.7:
        frames = round_trip(frames, int(rng.integers(18, 29)))
    with torch.no_grad():
        seen = features(tower, patches(frames))
    shown = label_grid(stream.events, length)[..., 0] >= 0
    count = shown.size if rng.random() < 0.5 else 256
    kept = keep_tokens(rng, shown, count)
    group, cell = (torch.from_numpy(axis)[None] for axis in np.divmod(kept, CELLS))
    asked = questions(rng, stream.events, length, _STREAM_QUESTIONS, weights)
    return Asked(seen.flatten(0, 1)[kept][None], group, cell, [asked])
