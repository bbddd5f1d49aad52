"""`millpond eval`: a public benchmark from its published files, under a budget. Reading options and printing only."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.errors import FAILED, note, say
from millpond.cli.options import (
    DeviceOption,
    DtypeOption,
    FpsOption,
    HostOption,
    JsonFlag,
    ModelOption,
    PixelsOption,
    Positions,
    PositionsOption,
    QuietFlag,
    RecentOption,
    budget_for,
    read_budget,
)
from millpond.policies import DEFAULT_POLICY
from millpond.printable import printable

if TYPE_CHECKING:
    from millpond.eval.benchmarks.answers import Shard
    from millpond.eval.benchmarks.base import Annotations, Benchmark


def _read_shard(value: str) -> Any:
    from millpond.eval.benchmarks.answers import Shard

    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{value!r} is not a part of a whole: write 1/4, 2/4, 3/4 and 4/4")
    return Shard(int(match[1]), int(match[2]))


def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK",
            help="mlvu, video-mme, longvideobench, egoschema, ovo-bench, streamingbench, rvs-ego or rvs-movie.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option("--data", "-d", metavar="DIR", help="The benchmark's files as published; videos anywhere below."),
    ],
    model: ModelOption = "minnow",
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            "-b",
            envvar="MILLPOND_BUDGET",
            parser=read_budget,
            metavar="SIZE",
            show_default="none: it must be given, unless --merge is",
            help="Bytes for everything that a stream remembers, under each policy with a cap.",
        ),
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy",
            "-p",
            help="A policy to measure. Repeatable. full, last-4-frames, uniform and recent always are.",
        ),
    ] = [DEFAULT_POLICY],  # noqa: B006
    host_budget: HostOption = None,
    fps: FpsOption = 2.0,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", show_default="no limit", help="Of a longer video take fewer frames a second, N in all."
        ),
    ] = None,
    max_pixels: PixelsOption = None,
    positions: PositionsOption = Positions.contiguous,
    recent_frames: RecentOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    shard: Annotated[
        Any,
        typer.Option(
            "--shard", parser=_read_shard, metavar="I/N", help="Watch only part I of N of the videos; 1/N to N/N."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default="runs/eval/BENCHMARK", help="Folder of the answers; a run in it is resumed."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Watch nothing: score the answers of all shards in --out.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="For RVS: an OpenAI-compatible server that judges answers. Its key is taken from MILLPOND_JUDGE_KEY.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the server's only one", help="The judge's model.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure policies on a public benchmark: each video watched once, each question asked at its time, the official score.

    Answers are written as they come; the same command goes on where it was stopped, and other settings in the same folder are refused
    (another policy is not: it adds a row).

    Rows that say nothing usable, missing videos and broken ones get a line each, are counted and left out; the exit code is then 1.
    Where nothing is left, or the budget is too small, the run stops.
    """
    from millpond.errors import MillpondError
    from millpond.eval.benchmarks import get
    from millpond.eval.benchmarks.run import folder_of

    chosen = get(benchmark)
    if judge is not None and not chosen.judged:
        raise typer.BadParameter(f"{chosen.title} needs no judge", param_hint="--judge")
    if merge and shard is not None:
        raise typer.BadParameter("give --shard or --merge, not both", param_hint="--merge")
    if not merge and budget is None:
        raise typer.BadParameter("give the bytes that a stream may take", param_hint="--budget")
    folder = out or folder_of(benchmark)
    annotations = chosen.read(data)
    if not quiet:
        for fault in annotations.faults:
            note(fault.line)
    if not annotations.videos:
        raise MillpondError(
            f"nothing to ask: {len(annotations.faults)} faults, and no video of {chosen.title} in {printable(str(data))}"
        )
    if not merge:
        from millpond.eval.benchmarks.answers import Shard

        budget_for(budget)
        annotations = _watch(
            chosen,
            annotations,
            folder,
            shard or Shard(),
            model=model,
            load={"dtype": dtype, "device": device, "max_pixels": max_pixels},
            policies=policy,
            quiet=quiet,
            settings={
                "budget": budget,
                "host_budget": host_budget,
                "fps": fps,
                "max_frames": max_frames,
                "max_pixels": max_pixels,
                "positions": positions.value,
                "recent_frames": recent_frames,
            },
        )
    _conclude(chosen, annotations, folder, judge, judge_model, sharded=shard is not None, as_json=as_json, quiet=quiet)


def _watch(
    benchmark: Benchmark,
    annotations: Annotations,
    folder: Path,
    shard: Shard,
    *,
    model: str,
    load: dict[str, Any],
    policies: list[str],
    quiet: bool,
    settings: dict[str, Any],
) -> Annotations:
    """Load the model and fill the folder; returns what can be asked of the model."""
    from tqdm import tqdm

    from millpond import models
    from millpond.cli.watch import silence
    from millpond.eval.benchmarks.answers import Answers
    from millpond.eval.benchmarks.run import askable, model_fingerprint, run, versions
    from millpond.eval.benchmarks.settings import Settings, arms

    chosen = arms(policies)
    if not quiet:
        note(f"loading the model {printable(model)} ...")
    silence()
    family = models.load(model, **load)
    known = len(annotations.faults)
    annotations, reserve = askable(annotations, family)
    if not quiet:
        for fault in annotations.faults[known:]:
            note(fault.line)
    fixed = Settings(
        benchmark=benchmark.name,
        questions=annotations.fingerprint,
        model=Path(model).name,
        weights=model_fingerprint(family),
        dtype=str(family.model.dtype).removeprefix("torch."),
        reserve_tokens=reserve,
        versions=versions(),
        **settings,
    )
    answers = Answers(folder, fixed)
    with tqdm(unit="pass", disable=quiet, file=sys.stderr) as bar:
        told = (lambda line: None) if quiet else (lambda line: bar.write(line, file=sys.stderr))
        for done, total in run(family, annotations, chosen, fixed, answers, shard, told=told):
            bar.total = total
            bar.update(done - bar.n)
    return annotations


def _conclude(
    benchmark: Benchmark,
    annotations: Annotations,
    folder: Path,
    judge_url: str | None,
    judge_model: str | None,
    *,
    sharded: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Judge, score, write and print; exits with 1 where something is missing that will not come by itself."""
    from tqdm import tqdm

    from millpond.errors import MillpondError
    from millpond.eval.accuracy.cell import REFERENCES
    from millpond.eval.benchmarks import report
    from millpond.eval.benchmarks.answers import read_passes, read_settings, write_json
    from millpond.eval.benchmarks.judge import SYSTEM, USER, Judge, judge_all, latest_judge
    from millpond.eval.benchmarks.run import all_asked
    from millpond.eval.hardware import describe

    settings, passes = read_settings(folder), read_passes(folder)
    if (settings.get("benchmark"), settings.get("questions")) != (benchmark.name, annotations.fingerprint):
        raise MillpondError(f"the answers in {printable(str(folder))} are to other questions than those of --data")
    there = {arm for _, arm in passes}
    names = list(dict.fromkeys(name for name in (*REFERENCES, *sorted(there)) if name in there))
    if judge_url is not None:
        judge = Judge(judge_url, judge_model)
        judge_model = judge.model
        if not quiet:
            note(f"{printable(judge_model)} is told:\n{SYSTEM}\n{USER}")
        asked = all_asked(annotations, passes, names)
        for _ in tqdm(
            judge_all(judge, asked, folder), total=len(asked), unit="verdict", disable=quiet, file=sys.stderr
        ):
            pass
    result: dict[str, Any] = {"settings": settings, "machine": describe()}
    if benchmark.judged:
        judge_model = judge_model or latest_judge(folder)
        result["judge"] = {"model": judge_model, "system": SYSTEM, "user": USER}
    rows = report.summarise(benchmark, annotations, passes, names, folder, judge_model)
    result["rows"] = rows
    title = f"{benchmark.title}, {settings.get('model')}, {settings.get('dtype')}, fps {settings.get('fps')}"
    report.write(folder, result, title)
    for row in rows:
        sent = benchmark.submission(report.answered(benchmark, annotations, passes, row["policy"], folder, judge_model))
        if sent is not None:
            write_json(folder / f"submission.{row['policy'].replace(':', '-')}.json", sent)
    say((json.dumps(result) if as_json else report.markdown(rows, title).rstrip("\n")) + "\n")
    missing = (
        {why for row in rows for why in row["left_out"]} - {"does not fit"} - ({"not asked yet"} if sharded else set())
    )
    if missing:
        raise typer.Exit(FAILED)
