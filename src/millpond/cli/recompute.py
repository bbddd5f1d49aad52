"""`millpond recompute plan`: what a budget costs in forward evaluations, and the picture of what is stored when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from millpond.cli.options import JsonFlag
from millpond.memory.budget import format_bytes, parse_bytes
from millpond.recompute.plans import Plan, Strategy, plan

app = typer.Typer(no_args_is_help=True, help="Backpropagation through time inside an activation budget.")


@app.callback()
def recompute() -> None:
    """Backpropagation through time inside an activation budget."""


@app.command("plan")
def plan_command(
    length: Annotated[int, typer.Option(max=1_000_000, help="Steps of the sequence; more take minutes to plan.")],
    hidden_bytes: Annotated[str, typer.Option(help="Bytes of one hidden state, for example 64KiB.")],
    internal_bytes: Annotated[str, typer.Option(help="Bytes that backpropagating through one step needs.")],
    budget: Annotated[str | None, typer.Option(help="Most bytes of stored activations, for example 64MiB.")] = None,
    slots: Annotated[int | None, typer.Option(help="Stored states, in place of a budget.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="What to store.")] = "auto",
    width: Annotated[int, typer.Option(help="Columns of the drawing.", min=10)] = 96,
    png: Annotated[Path | None, typer.Option(help="Also draw the timeline into this file (needs matplotlib).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan backpropagation through LENGTH steps: forward evaluations, peak bytes, and what is stored when.

    Measure the two sizes on a real step with `millpond.recompute.measure`.
    """
    made = plan(
        length=length,
        budget=budget,
        slots=slots,
        hidden_bytes=parse_bytes(hidden_bytes),
        internal_bytes=parse_bytes(internal_bytes),
        strategy=strategy,
    )
    if png is not None:
        made.timeline.save_png(png, title=_headline(made))
    typer.echo(json.dumps(made.to_dict()) if as_json else describe(made, width))


def describe(made: Plan, width: int = 96) -> str:
    """A plan for people: its figures, then its timeline, `width` columns wide."""
    saved = 1 - made.peak_bytes / made.full_bytes
    lines = [
        _headline(made),
        f"stored          {format_bytes(made.peak_bytes)} at most, of {format_bytes(made.full_bytes)} that plain "
        f"backpropagation keeps ({saved:.1%} saved)",
        f"forwards        {made.forwards} evaluations of a step, {made.forwards_per_step:.3f} a step",
        f"time            about {(made.forwards_per_step + 2) / 3:.2f} times plain, if a backward takes two forwards",
        f"optimum         {'yes, over all schedules' if made.exact else 'not proven: a bounded search'}",
        "",
        made.timeline.text(width=width),
    ]
    return "\n".join(lines)


def _headline(made: Plan) -> str:
    memory = f"{made.slots} slots" if made.budget_bytes is None else format_bytes(made.budget_bytes)
    return f"{made.length} steps inside {memory}, storing {made.strategy} states"
