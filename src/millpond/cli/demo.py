"""`millpond demo`: the whole way through the house in a minute, offline.

Makes a real MP4 with known events, streams it under a few per cent of what the full cache would take, asks about early,
middle and late events, and prints the answers beside the truth and beside what the memory still holds of each event.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millpond.budget import format_bytes
from millpond.cli.errors import FAILED, announce
from millpond.cli.live import clock
from millpond.cli.options import DEFAULT_POLICY, JsonFlag, Moment, PolicyOption, QuietFlag

if TYPE_CHECKING:
    from millpond.session import Session

__all__ = ["demo"]

_SHARE = 25
"""The budget is this fraction of the full cache: 4 %."""
_FPS = 2.0
_EDGE = 112
_EVENT_SECONDS = 4.0
_COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230)}


def demo(
    context: typer.Context,
    minutes: Annotated[float, typer.Option(min=5, metavar="MINUTES", help="Length of the stream.")] = 8.0,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB-ID", help="A model that has learnt something; by default a tiny random one."),
    ] = None,
    policy: PolicyOption = DEFAULT_POLICY,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.mp4", help="Keep the video here; otherwise it is thrown away.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make a video of several minutes, watch it under 4 % of the full cache, and compare the answers with the truth."""
    announce(context, as_json=as_json, quiet=quiet)
    from millpond import families, frames
    from millpond.cli.demo_model import random_family
    from millpond.cli.watch import Watch, silence
    from millpond.session import Session

    silence()
    events = _events(minutes * 60)
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        path = save or Path(folder) / "demo.mp4"
        frames.write_mp4(path, _picture(events, minutes * 60), _FPS)
        family = families.load(model) if model else random_family()
        group = family.grid(_EDGE, _EDGE)
        groups = int(minutes * 60 * _FPS) // family.frames_per_group
        full = groups * group.tokens * family.geometry.kv_bytes_per_token
        session = Session(family, budget=full // _SHARE, policy=policy, reserve_tokens=64)
        end = minutes * 60 - 1 / _FPS
        opened = frames.open(path)
        watching = Watch(session, opened, max_new_tokens=8, as_json=True, quiet=quiet)
        with opened, watching:
            watching.run([Moment(end, event.question) for event in events], [])
    rows = [
        Row(event.seconds, answer.at_seconds, event.question, event.colour, answer.text, _kept(session, event))
        for event, answer in zip(events, watching.answers, strict=False)
    ]
    usage = session.usage
    if as_json:
        answers = [{**asdict(row), "right": row.right} for row in rows]
        shown = model or "random weights"
        print(json.dumps({"model": shown, "policy": policy, "answers": answers, "usage": usage.to_dict()}))
    else:
        _print_rows(rows, session, trained=model is not None)
    if watching.error is not None or len(rows) < len(events):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Event:
    """A coloured square that shows for a few seconds."""

    seconds: float
    colour: str
    question: str


@dataclass(frozen=True)
class Row:
    """One question: when it happened and was asked (stream seconds), truth, answer, and the share of the event remembered."""

    event_seconds: float
    at_seconds: float
    question: str
    truth: str
    answer: str
    remembered: float

    @property
    def right(self) -> bool:
        return self.answer.strip().lower() == self.truth


def _events(seconds: float) -> list[Event]:
    named = zip(("first", "second", "last"), (0.03, 0.5, 0.95), _COLOURS, strict=True)
    return [Event(round(seconds * at), colour, f"What colour was the {name} square?") for name, at, colour in named]


def _picture(events: list[Event], seconds: float) -> Iterator[tuple[float, np.ndarray]]:
    """A quiet scene: a fixed ground with a little noise, and the squares."""
    random = np.random.default_rng(0)
    ground = np.kron(random.integers(60, 150, (7, 7, 3)), np.ones((_EDGE // 7, _EDGE // 7, 1), dtype=np.int64))
    for index in range(int(seconds * _FPS)):
        at = index / _FPS
        pixels = np.clip(ground + random.integers(-6, 7, ground.shape), 0, 255).astype(np.uint8)
        for event in events:
            if event.seconds <= at < event.seconds + _EVENT_SECONDS:
                pixels[28:70, 42:84] = _COLOURS[event.colour]
        yield at, pixels


def _kept(session: Session, event: Event) -> float:
    """The share of the event's tokens that is still remembered, over all layers and heads."""
    family = session.family
    group = family.grid(_EDGE, _EDGE)
    total = _EVENT_SECONDS * _FPS / family.frames_per_group * group.rows * group.cols
    shares = [
        ((layer.seconds >= event.seconds) & (layer.seconds < event.seconds + _EVENT_SECONDS) & (layer.row >= 0)).sum(
            axis=1
        )
        / total
        for layer in session.memory()
    ]
    return round(float(np.mean(shares)), 3)


def _print_rows(rows: list[Row], session: Session, *, trained: bool) -> None:
    usage = session.usage
    table = Table("happened", "asked", "question", "truth", "answer", "still in memory")
    for row in rows:
        answer = Text(row.answer if trained else repr(row.answer))
        table.add_row(
            clock(row.event_seconds), clock(row.at_seconds), row.question, row.truth, answer, f"{row.remembered:.0%}"
        )
    console = Console()
    console.print(table)
    if not trained:
        console.print(
            "The model has random weights, so its answers are noise; memory and speed are real.", soft_wrap=True
        )
    share = usage.peak_bytes / max(usage.full_cache_bytes, 1)
    rate = usage.frames_seen / max(usage.seconds_total - usage.seconds_answers, 1e-9)
    console.print(
        f"Memory at most {format_bytes(usage.peak_bytes)} of a budget of {format_bytes(usage.budget_bytes or 0)}: "
        f"{share:.1%} of the {format_bytes(usage.full_cache_bytes)} that a full cache takes. "
        f"{usage.frames_seen} frames at {rate:.0f} a second, {usage.compactions} compactions.",
        highlight=False,
        soft_wrap=True,
    )
