"""`millpond bench accuracy`: which policy keeps what is asked for, at how many bytes. Reading options and writing files only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.options import JsonFlag, Positions, QuietFlag
from millpond.errors import MillpondError
from millpond.minnow import SUPPORTED
from millpond.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from millpond.eval.accuracy.run import Study

app = typer.Typer(no_args_is_help=True, help="Measure on generated streams.")


@app.callback()
def bench() -> None:
    """Measure on generated streams."""


@app.command()
def accuracy(
    model: Annotated[str, typer.Option("--model", "-m", help="minnow, a local folder, or a hub id.")] = "minnow",
    policies: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Policies, with parameters as in infinipot-v:alpha=0.3; or all. full, last-4-frames, uniform and recent are "
            "always measured.",
        ),
    ] = DEFAULT_POLICY,
    budgets: Annotated[
        str, typer.Option(metavar="B,...", help="Shares of the full cache (1/16) or sizes (256KiB).")
    ] = "1/2,1/4,1/8,1/16,1/32",
    streams: Annotated[int, typer.Option(min=1, help="How many streams.")] = 200,
    groups: Annotated[int, typer.Option(min=4, help="Length of a stream in groups of two frames, one second.")] = 256,
    level: Annotated[str, typer.Option(help="How much the streams distract.")] = "standard",
    split: Annotated[str, typer.Option(help="Tune on train and validation, measure on test.")] = "test",
    positions: Annotated[list[Positions], typer.Option(help="As in `millpond watch`; repeatable.")] = [  # noqa: B006
        Positions.contiguous
    ],
    recent_frames: Annotated[int, typer.Option(min=0, metavar="N", help="As in `millpond watch`.")] = 0,
    questions: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Question types; by default those that Minnow supports.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Worker processes, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results; a study in it is resumed.")] = Path("runs/accuracy"),
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Accuracy per policy, budget, question and age of the event, compacting block by block as a session does.

    Writes accuracy.json, accuracy.md and accuracy.png (with matplotlib) into the folder, with 95 % intervals.
    """
    from millpond.eval import streams as generated
    from millpond.eval.accuracy.cell import REFERENCES, Cell, read_cells
    from millpond.eval.accuracy.run import Study, outcomes, run
    from millpond.eval.accuracy.table import markdown, summarise
    from millpond.policies import available

    names = _listed(policies)
    if names == ["all"]:
        names = [kind.name for kind in available() if kind.capped]
    types = tuple(_listed(questions)) if questions else SUPPORTED
    if unknown := [name for name in types if name not in generated.QUESTION_TYPES]:
        raise MillpondError(
            f"no question type is called {unknown[0]!r}; there are: {', '.join(generated.QUESTION_TYPES)}"
        )
    generated.generate_any(0, groups=groups, level=level, split=split)  # refuse a wrong name before any process starts
    cells: list[Cell] = []
    for way in positions:
        cells += read_cells([*REFERENCES], _listed(budgets), way.value)
        cells += read_cells(names, _listed(budgets), way.value, recent_frames)
    cells = list(dict.fromkeys(cells))
    study = Study(model, streams, groups, level, split, types)
    _progress(run(study, cells, out, processes=processes), quiet=quiet or as_json)
    rows = summarise(cells, (row for row in outcomes(out) if row.seed < streams), types)
    result = _write(study, rows, out)
    if as_json:
        print(json.dumps(result))
    else:
        print(markdown(rows))


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _progress(steps: Any, *, quiet: bool) -> None:
    from tqdm import tqdm

    with tqdm(unit="trial", disable=quiet, file=sys.stderr) as bar:
        for done, total in steps:
            bar.total = total
            bar.update(done - bar.n)


def _write(study: Study, rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    from millpond.eval.accuracy.chart import draw
    from millpond.eval.accuracy.table import markdown
    from millpond.eval.hardware import describe

    result = {"study": {**study.fixed, "streams": study.streams}, "machine": describe(), "rows": rows}
    (out / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "accuracy.md").write_text(markdown(rows), encoding="utf-8")
    try:
        title = f"{study.model}, {study.streams} {study.split} streams of {study.groups} groups, level {study.level}"
        draw(rows, out / "accuracy.png", title)
    except MillpondError as error:
        typer.echo(f"no picture: {error}", err=True)
    return result
