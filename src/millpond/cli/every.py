"""`--every "30s QUESTION"`: how it is read, and what is said of its answers. Knows nothing about sessions."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from millpond.cli.live import clock
from millpond.printable import printable

if TYPE_CHECKING:
    from millpond.standing import StandingEvent, StandingQuestion

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_SHORTEST, _LONGEST = 1e-3, 1e9


@dataclass(frozen=True)
class Every:
    """A question, and the seconds of stream time after which it is asked again."""

    seconds: float
    question: str


def read_every(value: str) -> Every:
    """Read `"30s Is somebody at the door?"`; also `ms`, `m` and `h`, and plain seconds."""
    interval, _, question = value.strip().partition(" ")
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(ms|s|m|h|)", interval)
    if match is None:
        raise typer.BadParameter(
            f"{value!r} does not begin with an interval: write for example '30s QUESTION', or 0.5s, 2m, 1h"
        )
    seconds = float(match[1]) * _UNITS[match[2]]
    if not _SHORTEST <= seconds <= _LONGEST:
        raise typer.BadParameter(
            f"an interval lies between a millisecond and {_LONGEST:.0e} s, and {interval} does not"
        )
    if not question.strip():
        raise typer.BadParameter(f"there is no question after {interval}")
    return Every(seconds, question.strip())


def read_command(value: str) -> list[str]:
    """The words of `--on-change COMMAND`, split as a shell does; no shell runs it.

    Raises:
        typer.BadParameter: there is no such program.
    """
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} cannot be split into words: {error}", param_hint="--on-change") from None
    if not words:
        raise typer.BadParameter("the command is empty", param_hint="--on-change")
    if "\0" in value or shutil.which(words[0]) is None:
        raise typer.BadParameter(f"there is no program {words[0]!r} to run", param_hint="--on-change")
    return words


def spoken(event: StandingEvent) -> str:
    """An answered event in two lines, for a person."""
    missed = f"; {event.missed} due times missed before" if event.missed else ""
    return f"[{clock(event.at_seconds)}] {event.question}\n  {event.text} ({event.kind}{missed})\n"


def total(question: StandingQuestion) -> str:
    """What became of a standing question, in one line; only what happened."""
    counts = question.counts
    told = [f"answered {counts.answered} times, {counts.changed} changes"]
    for number, what in (
        (counts.reused, "with another's answer"),
        (counts.late, "late"),
        (counts.missed, "due times missed"),
        (counts.overlapping, "due while still being answered"),
        (counts.failed, "failed"),
    ):
        if number:
            told.append(f"{number} {what}")
    return f"every {question.every_seconds:g} s, {printable(question.question)}: {', '.join(told)}"


def totals(question: StandingQuestion) -> dict[str, Any]:
    """The same for `--json`."""
    latest = question.latest
    return {
        "question": question.question,
        "every_seconds": question.every_seconds,
        "answer": None if latest is None else latest.text,
        **asdict(question.counts),
    }
