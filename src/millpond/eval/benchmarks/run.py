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

from millpond import frames
from millpond.errors import BudgetError, MillpondError, SourceError
from millpond.eval.benchmarks.answers import Answers, Shard
from millpond.eval.benchmarks.base import Annotations, Fault, Query, Video
from millpond.eval.benchmarks.settings import Arm, Settings
from millpond.eval.benchmarks.watch import Pass, watch
from millpond.models.base import Family
from millpond.printable import printable
from millpond.session import Session


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
    """Of the model's config and a few of its weights, without where it lies."""
    config = {key: value for key, value in family.model.config.to_dict().items() if not key.startswith("_")}
    weights = {name: tensor.flatten()[:4].float().tolist() for name, tensor in family.model.state_dict().items()}
    told = json.dumps([config, weights], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


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
        BudgetError, PolicyError: an arm does not fit into the budget, or cannot work here; as a rule before anything is watched.
    """
    before = answers.passes()
    jobs = [(video, arm) for video in shard.part(annotations.videos) for arm in chosen]
    left = [job for job in jobs if not ((key := (job[0].id, job[1].name)) in before and before[key].whole)]
    _check(family, settings, left)
    done = len(jobs) - len(left)
    yield done, len(jobs)
    mourned: set[str] = set()
    for video, arm in left:
        known = before.get((video.id, arm.name))
        began = perf_counter()
        found = watch(family, video, arm, settings)
        if found.broken is not None and video.id not in mourned:
            mourned.add(video.id)
            told(f"{printable(video.id)} breaks off: {found.broken}")
        if known is None or found.whole or replace(known, seconds_spent=0.0) != found:
            answers.add(shard, replace(found, seconds_spent=round(perf_counter() - began, 3)))
        done += 1
        yield done, len(jobs)


def _check(family: Family, settings: Settings, jobs: Sequence[tuple[Video, Arm]]) -> None:
    """Refuse what cannot work before anything is watched: each arm, for every frame size that it will meet."""
    sizes: dict[tuple[int, int], str] = {}
    for video in {video.id: video for video, _ in jobs}.values():
        try:
            with frames.open(video.path) as source:
                if source.info.height and source.info.width:
                    sizes.setdefault((source.info.height, source.info.width), video.id)
        except SourceError:
            continue  # told when it is its turn
    for arm in dict.fromkeys(arm for _, arm in jobs):
        session = Session(family, arm.config(settings))
        for (height, width), video_id in sizes.items():
            try:
                session.plan_for(height, width)
            except BudgetError as error:
                raise BudgetError(f"{arm.name}, {printable(video_id)}: {error}", minimum=error.minimum) from error
            except SourceError:
                continue  # the model cannot be shown such frames: as above


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
