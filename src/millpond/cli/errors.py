"""How a command fails: one line and an exit code, never a traceback for what a user can put right."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from millpond.errors import MillpondError
from millpond.printable import printable

FAILED = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells count: the second Ctrl-C gave up."""

_QUIET, _JSON = "millpond.quiet", "millpond.json"


def remember_quiet(context: typer.Context, value: bool) -> bool:
    """Callback of `--quiet`: tells the error handling that this command is to keep stderr clean."""
    context.meta[_QUIET] = value
    return value


def remember_json(context: typer.Context, value: bool) -> bool:
    """Callback of `--json`: tells the error handling that this command is to answer in JSON."""
    context.meta[_JSON] = value
    return value


def one_line(error: BaseException) -> str:
    """The message without line breaks and without what a terminal would obey."""
    return printable(" ".join(str(error).split()))


class OutputError(MillpondError):
    """Results have nowhere to go: stdout is closed, or full."""


def say(text: str) -> None:
    """Write to stdout at once; raises OutputError where that is not possible."""
    fault, cause = "it is closed", None
    if sys.stdout is not None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        except OSError as error:
            fault, cause = error.strerror or type(error).__name__, error
        except ValueError:
            pass
    raise OutputError(f"cannot write to stdout: {fault}") from cause


def note(text: str) -> None:
    """Write a line to stderr; one that nobody can read any more (a terminal that is gone) is no reason to fail."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Commands(TyperGroup):
    """The commands, with what a user can put right turned into one line on stderr and exit code 1.

    With `--quiet` the line is left out; with `--json` the error is an object on stdout too. Beside millpond's own errors that is
    what the system refuses: a full disk, a file that may not be written, stdout that is closed.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run; results that do not fit a plain-ASCII stdout are spelled out, and an unwritten rest is an error too."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        try:
            try:
                say("")  # closed: told before the work, not after it
                return super().main(*args, **options)
            finally:
                say("")  # what is still in its buffer
        except (OutputError, OSError) as error:
            if not _has_read_enough(error):
                note(f"error: {one_line(_told(error))}")
            _give_up_stdout()
            sys.exit(FAILED)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not _expected(error):
                raise
            line = one_line(_told(error))
            if ctx.meta.get(_JSON):
                with suppress(OutputError):
                    say(json.dumps({"error": line}) + "\n")
            if not (ctx.meta.get(_QUIET) or _has_read_enough(error)):
                note(f"error: {line}")
            try:
                say("")
            except OutputError:
                _give_up_stdout()
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            if not ctx.meta.get(_QUIET):
                note("interrupted")
            raise typer.Exit(INTERRUPTED) from error


def _expected(error: Exception) -> bool:
    """Whether a user can put it right; safetensors tells of a full disk in an error of its own."""
    safetensors = sys.modules.get("safetensors")
    ours = (MillpondError, OSError) if safetensors is None else (MillpondError, OSError, safetensors.SafetensorError)
    return isinstance(error, ours)


def _has_read_enough(error: BaseException) -> bool:
    """Whether the reader of stdout went away, as `head` does: nothing to complain of."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__cause__, BrokenPipeError)


def _told(error: Exception) -> Exception:
    """What the system says of a file, without its number; anything else as it is."""
    if not isinstance(error, OSError):
        return error
    where = "" if error.filename is None else f"{error.filename}: "
    return OSError(f"{where}{error.strerror or error or type(error).__name__}")


def _give_up_stdout() -> None:
    """Let what cannot be written go: Python would try once more at its end, and fail with a traceback of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if nowhere != 1:
        os.close(nowhere)
