"""`millpond demo`: the whole of millpond in a minute, offline.

Makes a real MP4 with known events, streams it through the model that ships with millpond under a sixteenth of what the full
cache would take, asks about early, middle and late events, and prints answers beside the truth.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millpond.cli.errors import FAILED
from millpond.cli.live import clock
from millpond.cli.options import JsonFlag, Moment, PolicyOption, QuietFlag
from millpond.config import SessionConfig
from millpond.memory.budget import format_bytes
from millpond.minnow import SUPPORTED
from millpond.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from millpond.answer import Usage

_SHARE = 16
"""The budget is this fraction of the full cache, or the minimum that works."""


def demo(
    groups: Annotated[
        int, typer.Option(min=16, metavar="GROUPS", help="Length of the stream in groups of two frames.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Which stream.")] = 0,
    level: Annotated[str, typer.Option(metavar="LEVEL", help="How much the stream distracts.")] = "standard",
    policy: PolicyOption = DEFAULT_POLICY,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.mp4", help="Keep the video here; otherwise it is thrown away.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Watch a generated video of several minutes under 1/16 of the full cache, and compare the answers with the truth."""
    from millpond import frames, models, policies
    from millpond.cli.watch import silence
    from millpond.cli.watching import Watch
    from millpond.device import minimum_budget
    from millpond.eval import streams
    from millpond.session import Session

    silence()
    stream = streams.generate(seed, groups=groups, level=level, split="test")
    family = models.load("minnow")
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        path = save or Path(folder) / "demo.mp4"
        stream.write(path)
        opened = frames.open(path)
        _, first = next(iter(stream.frames()))
        group = family.grid(*first.shape[:2])
        full = groups * group.tokens * family.geometry.kv_bytes_per_token
        config = SessionConfig(policy=policies.read(policy))
        # A short stream's full cache is so small that a part of it holds no prompt and no block.
        budget = max(full // _SHARE, minimum_budget(family, group, config))
        session = Session(
            family, config, budget=budget, host_budget=full if config.policy.needs.retrieved_frames else None
        )
        asked = [question for question in stream.questions if question.type in SUPPORTED]
        questions = sorted(asked, key=lambda question: question.ask_seconds)
        watching = Watch(session, opened, max_new_tokens=8, as_json=True, quiet=quiet)
        with opened, watching:
            watching.run([Moment(question.ask_seconds, question.text) for question in questions], [])
    rows = [
        Row(question.event_seconds, answer.at_seconds, question.text, question.answer, answer.text)
        for question, answer in zip(questions, watching.answers, strict=False)
    ]
    usage = session.usage
    if as_json:
        answers = [{**asdict(row), "right": row.right} for row in rows]
        print(json.dumps({"model": "minnow", "policy": policy, "answers": answers, "usage": usage.to_dict()}))
    else:
        _print_rows(rows, usage)
    if watching.error is not None or len(rows) < len(questions):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Row:
    """One question of the demo: when it happened, when it was asked (stream seconds), the truth and the answer."""

    event_seconds: float | None
    at_seconds: float
    question: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        return self.answer.strip().lower() == self.truth.strip().lower()


def _print_rows(rows: list[Row], usage: Usage) -> None:
    table = Table("happened", "asked", "question", "truth", "answer", "")
    for row in rows:
        happened = "" if row.event_seconds is None else clock(row.event_seconds)
        mark = "[green]right[/]" if row.right else "[red]wrong[/]"
        table.add_row(happened, clock(row.at_seconds), row.question, row.truth, Text(row.answer), mark)
    console = Console()
    console.print(table)
    share = usage.peak_bytes / max(usage.full_cache_bytes, 1)
    rate = usage.frames_seen / max(usage.seconds_total - usage.seconds_answers, 1e-9)
    console.print(
        f"{sum(row.right for row in rows)} of {len(rows)} right. Memory at most {format_bytes(usage.peak_bytes)}, "
        f"{share:.1%} of the {format_bytes(usage.full_cache_bytes)} that a full cache takes; {rate:.0f} frames a second.",
        highlight=False,
        soft_wrap=True,
    )
