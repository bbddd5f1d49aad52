"""`millpond watch`: stream a source into a session, and ask at the end, at moments of the stream, or at a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import typer

from millpond.cli.errors import FAILED, note
from millpond.cli.events import EventLog
from millpond.cli.options import (
    DEFAULT_MODEL,
    AdmissionOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    HostOption,
    JsonFlag,
    MemoryOption,
    ModelOption,
    Moment,
    PixelsOption,
    PolicyOption,
    Positions,
    PositionsOption,
    QuietFlag,
    RecentOption,
    SystemOption,
    budget_for,
    read_credentials,
    read_moment,
    read_text,
    session_config,
)
from millpond.policies import DEFAULT_POLICY
from millpond.printable import printable


def watch(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A video file, rtsp://, http:// or tcp:// URL, /dev/video0, a folder of images, or -.")
    ],
    model: ModelOption = DEFAULT_MODEL,
    ask: Annotated[
        list[str], typer.Option("--ask", "-a", metavar="QUESTION", help="Ask when the stream has ended. Repeatable.")
    ] = [],  # noqa: B006
    ask_at: Annotated[
        list[Moment],
        typer.Option(
            "--ask-at",
            parser=read_moment,
            metavar="SECONDS QUESTION",
            help="Ask when stream time reaches SECONDS, of all frames up to then. Repeatable.",
        ),
    ] = [],  # noqa: B006
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Ask at a prompt while the stream goes on.")
    ] = False,
    budget: BudgetOption = None,
    device_memory: MemoryOption = None,
    host_budget: HostOption = None,
    fps: FpsOption = 2.0,
    policy: PolicyOption = DEFAULT_POLICY,
    admission: AdmissionOption = None,
    recent_frames: RecentOption = 0,
    positions: PositionsOption = Positions.contiguous,
    system: SystemOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, envvar="MILLPOND_MAX_NEW_TOKENS", help="The longest answer, in tokens.")
    ] = 128,
    remember: Annotated[
        bool, typer.Option("--remember", envvar="MILLPOND_REMEMBER", help="Keep questions and answers in the memory.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    max_pixels: PixelsOption = None,
    live: Annotated[
        bool,
        typer.Option("--live", envvar="MILLPOND_LIVE", help="Drop frames rather than fall behind, as for cameras."),
    ] = False,
    allow_host: Annotated[
        list[str],
        typer.Option("--allow-host", metavar="HOST", help="A playlist may name this host beside its own. Repeatable."),
    ] = [],  # noqa: B006
    allow_path: Annotated[
        list[Path],
        typer.Option(
            "--allow-path", metavar="PATH", help="A playlist may name this file or folder beside its own. Repeatable."
        ),
    ] = [],  # noqa: B006
    credentials: Annotated[
        Path | None,
        typer.Option(
            "--credentials",
            envvar="MILLPOND_CREDENTIALS_FILE",
            metavar="FILE",
            help="A file with user:password for the address; or put them into MILLPOND_CREDENTIALS.",
        ),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option(
            "--events",
            envvar="MILLPOND_EVENTS",
            metavar="FILE",
            help="Add a line of JSON to FILE for whatever happens: losses of the source, answers, errors.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            envvar="MILLPOND_STATE",
            metavar="FILE",
            help="Keep the session in FILE, and go on where it stood when FILE is there: a video file at the time reached, what is live "
            "with what comes.",
        ),
    ] = None,
    state_every: Annotated[
        float,
        typer.Option(
            "--state-every",
            min=0,
            envvar="MILLPOND_STATE_EVERY",
            metavar="SECONDS",
            help="Save it that often; and at the end.",
        ),
    ] = 30.0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Watch a video inside a byte budget, and answer questions about it.

    Answers go to stdout. Ctrl-C (or SIGTERM, SIGHUP) ends the stream, asks what was left to ask and prints the summary; a second one
    gives up.
    At the prompt of -i, an empty line does nothing, `exit` ends the stream, and the end of input (Ctrl-D) ends the asking.

    When the source breaks, the questions are still asked of what was seen before, and the exit code is 1.
    """
    if interactive and source == "-":
        raise typer.BadParameter("the prompt and the video cannot both come from stdin", param_hint="--interactive")
    asked = [read_text(question, "--ask") for question in ask]
    moments = [Moment(moment.seconds, read_text(moment.question, "--ask-at")) for moment in ask_at]
    if system is not None:
        read_text(system, "--system")
    from millpond import frames

    log = EventLog(events, quiet=quiet)
    happened: SimpleQueue[frames.Event] = SimpleQueue()
    opened = frames.open(
        source,
        fps=fps,
        live=live or None,
        allow_hosts=allow_host,
        allow_paths=allow_path,
        credentials=read_credentials(credentials),
        on_event=happened.put,
    )
    with opened:
        if not quiet:
            note(f"loading the model {printable(model)} ...")  # importing torch and transformers takes seconds
        if quiet or as_json or not sys.stderr.isatty():
            silence()
        from millpond.cli.live import clock
        from millpond.cli.state import Continued, StateFile
        from millpond.cli.watching import Watch
        from millpond.minnow.familiar import familiar
        from millpond.session import Session

        budget_for(budget, device_memory)
        kept = None if state is None else StateFile(state, state_every)
        session = Session.from_pretrained(
            model,
            session_config(context),
            device_memory=device_memory,
            dtype=dtype,
            device=device,
            max_pixels=max_pixels,
        )
        if kept is not None:
            session = kept.resume(session, keep_budget=budget is None and device_memory is None)
        log.write("open", source=opened.info.name, live=opened.info.live, model=model)
        watched: Any = opened
        if kept is not None and kept.reached is not None:
            at, watched = kept.reached, Continued(opened, kept.reached, 1 / fps)
            log.write("resume", stream_seconds=at)
            if not quiet:
                note(f"going on at {clock(at)}, as {printable(str(state))} says")
            moments = [moment for moment in moments if moment.seconds >= at]  # the others have been asked
        watching = Watch(
            session,
            watched,
            max_new_tokens=max_new_tokens,
            remember=remember,
            as_json=as_json,
            quiet=quiet,
            prompt=interactive,
            events=log,
            arrived=happened,
            knows=familiar if model == DEFAULT_MODEL else None,
            state=kept,
        )
        with watching:
            watching.run(moments, asked)
        watching.conclude(model)
    if watching.error is not None:
        raise typer.Exit(FAILED)


def silence() -> None:
    """Keep other libraries' warnings and progress bars off stderr."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
