"""Accuracy of Minnow with a full cache, per question type: `python -m training.minnow.evaluate --out card.json`.

Streams go through `millpond.Session` with the policy "full", as frames straight from the generator and as real MP4 files.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

from millpond import Session, frames, minnow, models
from millpond.eval.accuracy.intervals import Accuracy, wilson
from millpond.eval.streams import Stream, generate
from millpond.models import Family

__all__ = ["evaluate", "main"]


def evaluate(
    family: Family, streams: Sequence[Stream], questions: Sequence[str] = minnow.SUPPORTED, *, through_mp4: bool
) -> dict[str, Accuracy]:
    """Accuracy per question type and over all ("all"), full cache, each question asked at the end of its stream."""
    marks: dict[str, list[bool]] = {name: [] for name in questions}
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        for stream in streams:
            session = Session(family, budget=None, policy="full")
            if through_mp4:
                path = Path(folder) / "stream.mp4"
                stream.write(path)
                session.feed(frames.open(path))
            else:
                session.feed(stream.frames())
            for question in stream.questions:
                if question.type in marks and question.earlier is None:
                    answer = session.ask(question.text, max_new_tokens=4)
                    marks[question.type].append(answer.text.strip() == question.answer)
    every = [mark for row in marks.values() for mark in row]
    return {name: wilson(sum(row), len(row)) for name, row in {**marks, "all": every}.items()}


def _measure(job: tuple[Path, str, bool, int, int, str]) -> dict[str, dict[str, object]]:
    """One table of the card, in a process of its own."""
    folder, level, through_mp4, count, groups, split = job
    torch.set_num_threads(1)
    streams = [generate(seed, groups=groups, level=level, split=split) for seed in range(count)]
    table = evaluate(models.load(folder), streams, through_mp4=through_mp4)
    return {name: asdict(accuracy) for name, accuracy in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", type=Path, help="a folder; by default the weights in the package")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--split", default="test")
    parser.add_argument("--levels", nargs="+", default=["standard"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write; standard output by default")
    asked = parser.parse_args()
    ways = {"raw": False, "mp4": True}
    cells = [(level, way) for level in asked.levels for way in ways]
    jobs = [
        (asked.model or minnow.folder(), level, ways[way], asked.streams, asked.groups, asked.split)
        for level, way in cells
    ]
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        tables = dict(zip(cells, pool.map(_measure, jobs), strict=True))
    card = {
        "streams": asked.streams,
        "seeds": [0, asked.streams - 1],
        "groups": asked.groups,
        "split": asked.split,
        "policy": "full",
        "machine": {"python": platform.python_version(), "torch": version("torch"), "processor": platform.machine()},
        "accuracy": {level: {way: tables[level, way] for way in ways} for level in asked.levels},
    }
    text = json.dumps(card, indent=1) + "\n"
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
