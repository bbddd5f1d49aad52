"""The options that several commands share, each with its environment variable; and how their values are read.

Reading only: nothing here loads a model or opens a source.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from millpond.cli.errors import remember_json, remember_quiet
from millpond.config import SessionConfig
from millpond.errors import BudgetError, SourceError
from millpond.memory.budget import parse_bytes
from millpond.printable import printable

_MOST_DIGITS = 32
_MOST_PIXELS = 1 << 27  # as for videos

DEFAULT_MODEL = "minnow"
DEFAULT_BUDGET = "a minute of video in full detail, at most half of the free memory"
"""What `millpond.device.default_budget` gives; `millpond plan` tells the number."""


class Positions(StrEnum):
    """`millpond.config.Positions`, as typer takes them for a repeatable option."""

    absolute = "absolute"
    contiguous = "contiguous"


@dataclass(frozen=True)
class Moment:
    """A question and the stream time in seconds at which to ask it."""

    seconds: float
    question: str


@dataclass(frozen=True)
class FrameSize:
    """Pixels of a frame."""

    width: int
    height: int


def read_moment(value: str) -> Moment:
    """Read `"12.5 Which digit is on screen?"`."""
    number, _, question = value.strip().partition(" ")
    try:
        seconds = float(number)
    except ValueError:
        raise typer.BadParameter(f"{value!r} does not begin with a time in seconds") from None
    if not 0 <= seconds < float("inf"):
        raise typer.BadParameter(f"a stream time must be 0 or more, not {number}")
    if not question.strip():
        raise typer.BadParameter(f"there is no question after {number}")
    return Moment(seconds, question.strip())


def read_size(value: str) -> FrameSize:
    """Read `"640x480"`, width first."""
    match = re.fullmatch(r"\s*([1-9][0-9]*)\s*[xX×]\s*([1-9][0-9]*)\s*", value)
    if match is None:
        raise typer.BadParameter(f"{value!r} is not a frame size: write for example 640x480 (width x height)")
    width, height = match.groups()
    if max(len(width), len(height)) > _MOST_DIGITS or int(width) * int(height) > _MOST_PIXELS:
        raise typer.BadParameter(f"a frame of that size is larger than any that is read ({_MOST_PIXELS:,} pixels)")
    return FrameSize(int(width), int(height))


def read_text(value: str, option: str) -> str:
    """The value, if it is text at all: a shell also passes on bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the text is not valid UTF-8", param_hint=option) from None
    return value


def read_credentials(file: Path | None) -> tuple[str, str] | None:
    """User and password from the first line of a file, or from MILLPOND_CREDENTIALS; None where there are none.

    Raises:
        SourceError: the file cannot be read, or there is no colon between the two. What was read is not repeated.
    """
    where, fault = "MILLPOND_CREDENTIALS", ""
    line = os.environ.get(where, "")
    if file is not None:
        where = printable(str(file))
        try:
            line = file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            fault = getattr(error, "strerror", None) or "it is not text"
    elif not line:
        return None
    user, colon, password = line.partition(":")
    if fault or not colon:
        raise SourceError(f"no credentials in {where}: {fault or 'it must be user:password'}")
    return user, password


def read_budget(value: str) -> int:
    """Read a byte size; what cannot be read is a mistake of usage, what is too small for a model is not."""
    if len(value) > _MOST_DIGITS:
        raise typer.BadParameter("that is more than any memory: write for example 512MiB or 2GB")
    try:
        return parse_bytes(value)
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from error


def budget_for(budget: int | None, device_memory: int | None = None) -> int | None:
    """A budget that this machine can hold; None for the model's default, or where the device's memory is given instead."""
    import torch

    from millpond.memory.available import check_memory

    if device_memory is not None and budget is not None:
        raise typer.BadParameter("give --budget or --device-memory, not both", param_hint="--device-memory")
    if not torch.cuda.is_available():  # before a model is loaded; on a device of its own the session looks
        check_memory(budget or device_memory or 0)
    return budget


def session_config(context: typer.Context) -> SessionConfig:
    """A session's arguments, from those of a command's options that are called as they are."""
    names = {field.name for field in fields(SessionConfig)}
    return SessionConfig(**{name: value for name, value in context.params.items() if name in names})


class WatchCommand(TyperCommand):
    """Lets `--ask-at 12.5 "..."` take its two values as two words, which typer cannot do for a repeatable option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_moments(args))


def join_moments(args: list[str]) -> list[str]:
    """Make one word of the time and the question behind each `--ask-at`."""
    joined: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--":
            return [*joined, word, *words]
        option, equals, time = word.partition("=")
        if option != "--ask-at":
            joined.append(word)
            continue
        if not equals:
            time = next(words, "")
        if _is_number(time):
            time = f"{time} {next(words, '')}"
        joined.append(f"--ask-at={time}")
    return joined


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _option(name: str, *short: str, **more: Any) -> Any:
    """An option that can be set through the environment too: `--max-pixels` by MILLPOND_MAX_PIXELS."""
    return typer.Option(name, *short, envvar="MILLPOND_" + name[2:].replace("-", "_").upper(), **more)


ModelOption = Annotated[str, _option("--model", "-m", help="minnow (ships inside), a local folder, or a hub id.")]
PixelsOption = Annotated[
    int | None,
    _option(
        "--max-pixels",
        min=1,
        metavar="PIXELS",
        show_default="the model's own",
        help="Most pixels of a frame after resizing; fewer cost fewer tokens.",
    ),
]
BudgetOption = Annotated[
    int | None,
    _option(
        "--budget",
        "-b",
        parser=read_budget,
        metavar="SIZE",
        show_default=DEFAULT_BUDGET,
        help="Bytes for everything the stream remembers: 512MiB, 2GB or a plain number.",
    ),
]
MemoryOption = Annotated[
    int | None,
    _option(
        "--device-memory",
        parser=read_budget,
        metavar="SIZE",
        help="In place of a budget: bytes for weights, stream and workspace together, planned for frames of 640x480 or --size.",
    ),
]
HostOption = Annotated[
    int | None,
    _option(
        "--host-budget",
        parser=read_budget,
        metavar="SIZE",
        help="Beside the budget: bytes of host memory for a policy that retrieves frames from there (rekv).",
    ),
]
PolicyOption = Annotated[str, _option("--policy", "-p", help="The policy; `millpond policies` lists them.")]
AdmissionOption = Annotated[
    str | None,
    _option(
        "--admission",
        metavar="NAME",
        show_default="everything",
        help="A frame filter in front of the decoder: curvestream.",
    ),
]
RecentOption = Annotated[
    int,
    _option(
        "--recent-frames",
        min=0,
        metavar="N",
        help="Show each question the latest N frames again, encoded anew; their pixels and slots count against the budget.",
    ),
]
PositionsOption = Annotated[
    Positions,
    _option(
        "--positions",
        help="Rotary positions near the trained limit: keep true distances in time, or close the gaps that evictions left.",
    ),
]
FpsOption = Annotated[float, _option("--fps", min=0.001, help="Frames taken per second of video.")]
SystemOption = Annotated[
    str | None, _option("--system", help="A system message, pinned in the memory.", metavar="TEXT")
]
DtypeOption = Annotated[
    str | None,
    _option("--dtype", metavar="DTYPE", show_default="the checkpoint's own", help="float32, bfloat16 or float16."),
]
DeviceOption = Annotated[
    str | None,
    _option("--device", metavar="DEVICE", show_default="cuda where there is one", help="cpu, cuda, cuda:1, ..."),
]
JsonFlag = Annotated[
    bool,
    _option(
        "--json", is_eager=True, callback=remember_json, help="For machines: the last line of stdout is one object."
    ),
]
QuietFlag = Annotated[bool, _option("--quiet", "-q", is_eager=True, callback=remember_quiet, help="Nothing on stderr.")]
