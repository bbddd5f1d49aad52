"""A study: many streams, many cells, several processes, resumable. Knows nothing about how results are drawn.

Every finished (stream, cell) is one line of `outcomes.jsonl` in the study's folder; a study that is started again does what is missing.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging

from millpond import models
from millpond.errors import MillpondError
from millpond.eval.accuracy.cell import Cell
from millpond.eval.accuracy.trial import Outcome, watch
from millpond.eval.streams import generate_any

_SETTINGS, _OUTCOMES = "study.json", "outcomes.jsonl"


@dataclass(frozen=True)
class Study:
    """What is the same for every cell.

    Attributes:
        model: as `millpond.models.load` takes it.
        streams: how many, seeds 0 ... streams - 1.
        groups, level, split: as in `millpond.eval.streams.generate_any`.
        questions: question types to ask.
    """

    model: str
    streams: int
    groups: int
    level: str
    split: str
    questions: tuple[str, ...]

    @property
    def fixed(self) -> dict[str, object]:
        """What must not change when a study is resumed; more streams may be added."""
        settings = asdict(self)
        del settings["streams"]
        return {**settings, "questions": list(self.questions)}


def run(study: Study, cells: Sequence[Cell], folder: Path, *, processes: int = 2) -> Iterator[tuple[int, int]]:
    """Do what is missing, and yield (trials done, trials in all) after each stream.

    Raises:
        MillpondError: the folder holds another study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder / _SETTINGS, study)
    done = {(outcome.seed, outcome.cell) for outcome in outcomes(folder)}
    missing = {
        seed: todo
        for seed in range(study.streams)
        if (todo := [cell for cell in cells if (seed, cell.name) not in done])
    }
    total = study.streams * len(cells)
    left = sum(map(len, missing.values()))
    yield total - left, total
    if not missing:
        return
    jobs = iter(missing.items())
    with (
        (folder / _OUTCOMES).open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_interrupts) as pool,
    ):
        running: set[Future[list[Outcome]]] = set()
        try:
            # A few jobs ahead: all at once would be computed to the end after Ctrl-C.
            while running or left:
                while len(running) < 2 * processes and (job := next(jobs, None)) is not None:
                    running.add(pool.submit(_trial, study, *job))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    for outcome in future.result():
                        file.write(json.dumps(asdict(outcome)) + "\n")
                        left -= 1
                file.flush()
                yield total - left, total
        finally:
            pool.shutdown(cancel_futures=True)


def outcomes(folder: Path) -> list[Outcome]:
    """What a study has so far; a line cut off by a crash is done again."""
    path = folder / _OUTCOMES
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(Outcome.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            continue
    if path.exists() and (text := path.read_text(encoding="utf-8")) and not text.endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")
    return found


def _claim(path: Path, study: Study) -> None:
    if not path.exists():
        path.write_text(json.dumps(study.fixed, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key, value in study.fixed.items() if before.get(key) != value]:
        raise MillpondError(
            f"{path.parent} holds a study with another {changed[0]} ({before.get(changed[0])!r}): choose another --out"
        )


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the parent answers it, by ending the study after the running trials."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_family = None  # one per worker process


def _trial(study: Study, seed: int, cells: list[Cell]) -> list[Outcome]:
    global _family
    if _family is None:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        _family = models.load(study.model)
    stream = generate_any(seed, groups=study.groups, level=study.level, split=study.split)
    return watch(_family, stream, cells, study.questions)
