"""How a command fails: one line and an exit code, never a traceback for what a user can put right."""

from __future__ import annotations

import json
from typing import Any

import typer
from typer.core import TyperGroup

from millpond.errors import MillpondError

__all__ = ["FAILED", "INTERRUPTED", "Commands", "announce", "one_line"]

FAILED = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells count: the second Ctrl-C gave up."""

_QUIET, _JSON = "millpond.quiet", "millpond.json"


def announce(context: typer.Context, *, as_json: bool = False, quiet: bool = False) -> None:
    """Tell the error handling how this command was asked to speak."""
    context.meta[_QUIET] = quiet
    context.meta[_JSON] = as_json


def one_line(error: BaseException) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


class Commands(TyperGroup):
    """The commands, with millpond's own errors turned into one line on stderr and exit code 1.

    With `--quiet` the line is left out; with `--json` the error is an object on stdout too.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MillpondError as error:
            line = one_line(error)
            if ctx.meta.get(_JSON):
                typer.echo(json.dumps({"error": line}))
            if not ctx.meta.get(_QUIET):
                typer.echo(f"error: {line}", err=True)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            if not ctx.meta.get(_QUIET):
                typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error
