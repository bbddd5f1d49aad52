"""The `millpond` command: which verbs there are. Each verb has a file of its own."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from millpond.cli import bench, demo, inspect, precision, recompute
from millpond.cli import eval as evaluation
from millpond.cli.errors import Commands
from millpond.cli.options import WatchCommand
from millpond.cli.watch import watch

app = typer.Typer(
    name="millpond",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"millpond {version('millpond')}")
        raise typer.Exit


@app.callback()
def millpond(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Watch endless video inside a byte budget, and answer questions about it at any moment.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 given up with a second Ctrl-C.
    Options can be set through the environment variables named with them.
    """


app.command(cls=WatchCommand)(watch)
app.command()(inspect.plan)
app.command()(inspect.doctor)
app.command()(inspect.models)
app.command()(inspect.policies)
app.command()(demo.demo)
app.command()(precision.quantize)
app.command()(precision.calibrate)
app.command("eval")(evaluation.evaluate)
app.add_typer(bench.app, name="bench")
app.add_typer(recompute.app, name="recompute")


def main() -> None:
    """Entry point of the `millpond` command."""
    app(prog_name="millpond")
