"""One stream through every cell: fed and compacted block by block, each question when it is to be asked. Knows nothing about tables."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from millpond import policies
from millpond.errors import BudgetError, PolicyError
from millpond.eval.accuracy.cell import LAST_FRAMES, Cell
from millpond.eval.accuracy.sharing import SharedStream
from millpond.eval.streams import Stream, VideoStream
from millpond.models.base import Family
from millpond.session import Session


@dataclass(frozen=True)
class Mark:
    """One answer: its question's type, seconds from the event to the question (None: it rests on no event), and whether it was right."""

    type: str
    age: float | None
    right: bool


@dataclass(frozen=True)
class Outcome:
    """What one cell did on one stream.

    Attributes:
        seed: of the stream.
        cell: the cell's name.
        marks: one per question; empty where `refused` says why.
        refused: the error where the budget is too small for this model or this policy, else None.
        budget_bytes, peak_bytes, full_cache_bytes, scratch_bytes, memory_tokens, compactions: as the session counts them.
        seconds_compaction: spent in selection, compaction and re-anchoring.
        seconds_decoder: spent in the decoder while watching; blocks that an earlier cell ran count what they took there.
    """

    seed: int
    cell: str
    marks: list[Mark] = field(default_factory=list)
    refused: str | None = None
    budget_bytes: int | None = None
    peak_bytes: int = 0
    full_cache_bytes: int = 0
    scratch_bytes: int = 0
    memory_tokens: int = 0
    compactions: int = 0
    seconds_compaction: float = 0.0
    seconds_decoder: float = 0.0

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Outcome:
        return cls(**{**row, "marks": [Mark(**mark) for mark in row["marks"]]})


def watch(
    family: Family, stream: Stream | VideoStream, cells: Iterable[Cell], questions: Sequence[str]
) -> list[Outcome]:
    """Run the stream through each cell.

    Args:
        questions: the question types to ask; two-turn questions are left out.
    """
    frames = list(stream.frames())
    shared = SharedStream(family)
    return [_run(shared, stream, frames, cell, questions) for cell in cells]


def _run(
    shared: SharedStream,
    stream: Stream | VideoStream,
    frames: list[tuple[float, np.ndarray]],
    cell: Cell,
    questions: Sequence[str],
) -> Outcome:
    family, shared.spared = shared.family, 0.0
    grid = family.grid(*frames[0][1].shape[:2])
    full = len(frames) // family.frames_per_group * grid.tokens * family.geometry.kv_bytes_per_token
    last = cell.policy == LAST_FRAMES
    policy = policies.read("full" if last else cell.policy)

    def opened() -> Session:
        session = Session(
            family,
            budget=cell.bytes_of(full),
            policy=policy,
            positions=cell.positions,
            recent_frames=cell.recent_frames,
            host_budget=full if policy.needs.retrieved_frames else None,
        )
        session.plan_for(*frames[0][1].shape[:2])
        return session

    asked = [question for question in stream.questions if question.type in questions and question.earlier is None]
    moments = sorted({question.ask_seconds for question in asked} | {stream.seconds})
    marks, fed = [], 0
    try:
        session = opened()
        for index, moment in enumerate(moments):
            until = bisect_left(frames, moment, key=lambda frame: frame[0])
            if last and index:
                session = opened()
            session.feed(frames[max(0, until - 4) if last else fed : until])
            fed = until
            for question in asked:
                if question.ask_seconds == moment:
                    answer = session.ask(question.text, max_new_tokens=4)
                    age = None if question.event_seconds is None else question.ask_seconds - question.event_seconds
                    marks.append(Mark(question.type, age, answer.text.strip().lower() == question.answer.lower()))
    except (BudgetError, PolicyError) as error:  # a policy too may need more than this budget has room for
        return Outcome(stream.seed, cell.name, refused=str(error))
    spared = shared.spared
    usage = session.usage
    return Outcome(
        seed=stream.seed,
        cell=cell.name,
        marks=marks,
        budget_bytes=usage.budget_bytes,
        peak_bytes=usage.peak_bytes,
        full_cache_bytes=full,
        scratch_bytes=session.plan.scratch_bytes,
        memory_tokens=usage.memory_tokens,
        compactions=usage.compactions,
        seconds_compaction=round(usage.seconds_compaction, 4),
        seconds_decoder=round(usage.seconds_decoder + spared, 4),
    )
