"""Verbs that tell what there is: `plan`, `doctor`, `models`, `policies`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millpond.cli.errors import FAILED
from millpond.cli.options import (
    DEFAULT_MODEL,
    BudgetOption,
    DtypeOption,
    FpsOption,
    FrameSize,
    JsonFlag,
    MemoryOption,
    ModelOption,
    PixelsOption,
    PolicyOption,
    QuietFlag,
    RecentOption,
    SystemOption,
    budget_for,
    read_size,
    session_config,
)
from millpond.config import SessionConfig
from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from millpond.cache.plan import Plan
    from millpond.models.base import Family
    from millpond.precision.device_budget import DeviceSplit


def plan(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    budget: BudgetOption = None,
    device_memory: MemoryOption = None,
    size: Annotated[
        FrameSize,
        typer.Option(
            "--size", "-s", envvar="MILLPOND_SIZE", parser=read_size, metavar="WIDTHxHEIGHT", help="Pixels of a frame."
        ),
    ] = "640x480",  # type: ignore[assignment]
    fps: FpsOption = 2.0,
    policy: PolicyOption = DEFAULT_POLICY,
    recent_frames: RecentOption = 0,
    system: SystemOption = None,
    dtype: DtypeOption = None,
    max_pixels: PixelsOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show how a budget, or a device's memory, is split for a model and a frame size; too small a one names the minimum that works."""
    from millpond import models
    from millpond.cli.watch import silence
    from millpond.device import default_budget, plan_device

    silence()
    budget_for(budget, device_memory)
    family = models.load(model, dtype=dtype, max_pixels=max_pixels, weights=False)
    title = f"{model}, {policy}, frames of {size.width} x {size.height} at {fps:g} a second"
    config, device = session_config(context), {}
    if device_memory is not None:
        whole = plan_device(family, model, device_memory, (size.height, size.width), config)
        split, device = whole.plan, {"device": whole.split.to_dict()}
        if not as_json:
            _print_device(whole.split, title)
    else:
        if config.budget is None and config.policy.capped:
            config = replace(config, budget=default_budget(family, config, (size.height, size.width), fps))
        split = _split(family, config, size)
    if as_json:
        seconds = {"fps": fps, "seconds_in_full": split.seconds_in_full(fps)}
        frame = {"width": size.width, "height": size.height}
        print(json.dumps({"model": model, "policy": policy, **frame, **seconds, **device, **split.to_dict()}))
    else:
        _print_plan(split, "the stream's part" if device else title, fps)


def _split(family: Family, config: SessionConfig, size: FrameSize) -> Plan:
    """The plan; where the budget cannot hold even the prompt, the error still names the minimum for these frames."""
    from millpond.device import minimum_budget
    from millpond.memory.budget import format_bytes
    from millpond.stream.runner import Runner

    grid, budget = family.grid(size.height, size.width), config.budget
    try:
        return Runner(family, config).plan_for(grid)
    except BudgetError as error:
        if budget is None or error.minimum is None:
            raise
        minimum = minimum_budget(family, grid, config)
        raise BudgetError(
            f"a budget of {format_bytes(budget)} is too small for frames of {size.width} x {size.height}: "
            f"the minimum that works is {minimum} bytes ({format_bytes(minimum)})",
            minimum=minimum,
        ) from error


def _table(title: str, first: str, *columns: str) -> Table:
    """An empty table: numbers between the first and the last column."""
    table = Table(first, title=Text(title), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name is columns[-1] else "right")
    return table


def _print_device(split: DeviceSplit, title: str) -> None:
    table = _table(title, "", "bytes", "", "what for")
    read = "as they are" if split.bits is None else f"every linear read at {split.bits} bits"
    for name, size, note in (
        ("weights", split.weights, read),
        ("stream", split.kv, f"at most {split.slots} tokens, see below"),
        ("workspace", split.workspace, "of a forward pass"),
        ("device", split.device, ""),
    ):
        table.add_row(name, str(size), format_bytes(size), note)
    Console().print(table)


def _print_plan(split: Plan, title: str, fps: float) -> None:
    table = _table(title, "", "tokens", "bytes", "", "what for")
    for line in split.lines:
        if line.bytes:
            size = str(line.bytes), format_bytes(line.bytes)
            table.add_row(line.name, str(line.slots) if line.slots else "", *size, line.purpose)
    total = str(split.total_bytes), format_bytes(split.total_bytes)
    cap = "no cap: it grows" if split.budget is None else f"of {split.budget} bytes"
    table.add_row("total", str(split.slots), *total, cap)
    console = Console()
    console.print(table)
    full = f"{split.frames_in_full} frames = {split.seconds_in_full(fps):g} s in full detail, more when thinned"
    console.print(f"{split.bytes_per_token} bytes per token, metadata included; in memory {full}", highlight=False)


def doctor(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Tell what is installed, which devices and codecs are there, and what would work; exit code 1 if watching would not."""
    from millpond.cli.health import checks

    found = checks()
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found]}))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in found:
            mark = {None: "", True: "[green]ok[/]", False: "[red]missing[/]" if check.needed else "[yellow]absent[/]"}
            table.add_row(check.what, mark[check.good], Text(check.found))  # not markup: extras are in brackets
        Console().print(table)
    if any(check.needed and check.good is False for check in found):
        raise typer.Exit(FAILED)


def policies(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """List the policies: what each forgets, where it comes from, and its parameters."""
    from millpond import policies as registry

    rows: list[dict[str, Any]] = []
    for kind in registry.available():
        policy = registry.get(kind.name)
        rows.append(
            {
                "name": kind.name,
                "capped": kind.capped,
                "question_agnostic": kind.agnostic,
                "parameters": {field.name: getattr(policy, field.name) for field in fields(policy)},
                "source": kind.source,
            }
        )
    if as_json:
        print(json.dumps({"policies": rows}, default=str))
        return
    for row in rows:
        notes = [
            *(["no cap"] if not row["capped"] else []),
            *(["sees questions"] if not row["question_agnostic"] else []),
        ]
        notes += [f"{name}={value}" for name, value in row["parameters"].items()]
        print(f"{row['name']}: {', '.join(notes) or 'no parameters'}")
        print(f"    {row['source']}")


def models(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """List the model families that can be loaded from a folder or by hub id."""
    from millpond import models

    rows = models.supported()
    if as_json:
        print(json.dumps({"model_types": {row.model_type: row.name for row in rows}}))
        return
    for row in rows:
        print(f"{row.model_type:18} {row.name}")
