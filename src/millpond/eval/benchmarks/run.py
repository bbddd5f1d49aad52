"""A run: every video of a benchmark through every arm, resumable and in shards. Knows nothing about how results are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
import transformers

from millpond.errors import MillpondError
from millpond.eval.benchmarks.answers import Answers, Shard
from millpond.eval.benchmarks.base import Annotations, Fault, Query, Video
from millpond.eval.benchmarks.settings import Arm, Settings
from millpond.eval.benchmarks.watch import Pass, watch
from millpond.models.base import Family
from millpond.printable import printable


def askable(annotations: Annotations, family: Family) -> tuple[Annotations, int]:
    """The questions that this model can be asked, and the slots that the longest of all needs with its answer.

    Those that its tokenizer cannot take as mere text become faults; the fingerprint stays.
    """
    refused, most = {}, 0
    for query in annotations.queries:
        try:
            most = max(most, len(family.question(query.prompt, after_video=True)) + query.max_new_tokens)
        except MillpondError as error:
            refused[query.id] = Fault("refused question", f"{printable(query.id)}: {error}", query.after_yes is None)
    faults, videos = list(annotations.faults), []
    for video in annotations.videos:
        faults += [refused[query.id] for query in video.queries if query.id in refused]
        fine = [query for query in video.queries if not {query.id, query.after_yes} & refused.keys()]
        if fine:
            videos.append(replace(video, queries=tuple(fine)))
    return replace(annotations, videos=tuple(videos), faults=tuple(faults)), most + 1


def model_fingerprint(family: Family) -> str:
    """Of the model's config, without where it lies."""
    config = {key: value for key, value in family.model.config.to_dict().items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what computes the answers."""
    return {"millpond": version("millpond"), "torch": torch.__version__, "transformers": transformers.__version__}


def run(
    family: Family,
    annotations: Annotations,
    chosen: Sequence[Arm],
    settings: Settings,
    answers: Answers,
    shard: Shard,
    *,
    told: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, int]]:
    """Do what is missing, and yield (passes done, passes in all) of this shard, after each one.

    Args:
        told: given a line for each video that cannot be watched, once.

    Raises:
        BudgetError: an asked policy does not fit into the budget: nothing is gained by going on. PolicyError: or cannot work here.
    """
    for arm in chosen:
        arm.config(settings)  # what cannot work is refused before anything is watched
    jobs = [(video, arm) for video in shard.part(annotations.videos) for arm in chosen]
    before = answers.passes()
    done = sum((key := (video.id, arm.name)) in before and before[key].whole for video, arm in jobs)
    yield done, len(jobs)
    mourned: set[str] = set()
    for video, arm in jobs:
        known = before.get((video.id, arm.name))
        if known is not None and known.whole:
            continue
        began = perf_counter()
        found = watch(family, video, arm, settings)
        if found.broken is not None and video.id not in mourned:
            mourned.add(video.id)
            told(f"{printable(video.id)} breaks off: {found.broken}")
        if known is None or found.whole or replace(known, seconds_spent=0.0) != found:
            answers.add(shard, replace(found, seconds_spent=round(perf_counter() - began, 3)))
        done += 1
        yield done, len(jobs)


def asked_of(video: Video, found: Pass | None) -> list[tuple[Query, str]]:
    """The questions that an arm has answered about a video, with its answers."""
    said = {} if found is None else {reply.query: reply.text for reply in found.replies}
    return [(query, said[query.id]) for query in video.queries if query.id in said]


def all_asked(
    annotations: Annotations, passes: dict[tuple[str, str], Pass], names: Sequence[str]
) -> list[tuple[Query, str]]:
    """The same of all videos and arms."""
    return [
        pair for name in names for video in annotations.videos for pair in asked_of(video, passes.get((video.id, name)))
    ]


def folder_of(benchmark: str) -> Path:
    """Where a run's answers go where nobody says."""
    return Path("runs") / "eval" / benchmark
