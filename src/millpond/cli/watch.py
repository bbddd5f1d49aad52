"""`millpond watch`: stream a source into a session, and ask at the end, at moments of the stream, or at a prompt."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.errors import FAILED, announce, one_line
from millpond.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_POLICY,
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
    read_moment,
)
from millpond.cli.tap import Tap
from millpond.errors import MillpondError

if TYPE_CHECKING:
    from millpond.answer import Answer
    from millpond.session import Session

__all__ = ["Watch", "silence", "watch"]


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
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Watch a video inside a byte budget, and answer questions about it.

    Answers go to stdout. Ctrl-C ends the stream, asks what was left to ask and prints the summary; a second one gives up.
    At the prompt of -i, an empty line does nothing, `exit` ends the stream, and the end of input (Ctrl-D) ends the asking.

    When the source breaks, the questions are still asked of what was seen before, and the exit code is 1.
    """
    announce(context, as_json=as_json, quiet=quiet)
    if interactive and source == "-":
        raise typer.BadParameter("the prompt and the video cannot both come from stdin", param_hint="--interactive")
    if quiet or as_json or not sys.stderr.isatty():
        silence()
    from millpond import frames
    from millpond.session import Session

    opened = frames.open(source, fps=fps, live=live or None)
    session = Session.from_pretrained(
        model,
        budget=budget_for(budget, device_memory),
        device_memory=device_memory,
        host_budget=host_budget,
        policy=policy,
        admission=admission,
        recent_frames=recent_frames,
        positions=positions.value,
        system=system,
        dtype=dtype,
        device=device,
        max_pixels=max_pixels,
    )
    watching = Watch(
        session,
        opened,
        max_new_tokens=max_new_tokens,
        remember=remember,
        as_json=as_json,
        quiet=quiet,
        prompt=interactive,
    )
    with opened, watching:
        watching.run(ask_at, ask)
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


class Watch:
    """One run of a session over a source, with its questions, its prompt and its way of printing.

    Entered, Ctrl-C stops the stream instead of killing the process; a second Ctrl-C raises KeyboardInterrupt.

    Args:
        prompt: ask at a prompt on the terminal while the stream goes on in a thread of its own.

    Attributes:
        answers: all given so far, in order.
        error: the first thing that went wrong; None while nothing did.
    """

    def __init__(
        self,
        session: Session,
        source: Any,
        *,
        max_new_tokens: int = 128,
        remember: bool = False,
        as_json: bool = False,
        quiet: bool = False,
        prompt: bool = False,
    ) -> None:
        from millpond.cli.live import LiveLine

        self._session = session
        self._limit, self._remember = max_new_tokens, remember
        self._json, self._quiet, self._prompt = as_json, quiet, prompt
        self.answers: list[Answer] = []
        self.error: MillpondError | None = None
        self._speaking = threading.Lock()
        self._prompting = False
        self._interrupted = False
        self._line = LiveLine(lambda: session.usage, shown=not quiet and not prompt)
        self._tap = Tap(source, tick=self._tick)
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> Watch:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._line.clear()
        self._tap.close()
        signal.signal(signal.SIGINT, self._previous)

    def run(self, moments: list[Moment], questions: list[str]) -> None:
        """Watch to the end and ask everything.

        What goes wrong on the way is told at once and kept in `error`; what had been seen before is still asked about.

        Raises:
            MillpondError: the source gave nothing at all.
        """
        with self._line:
            if self._prompt:
                self._at_a_prompt(moments)
            else:
                self._stream(moments)
            if self.error is not None and not self._session.usage.frames_seen:
                raise self.error
            if self._interrupted:
                self._note("stopped")
            for question in questions:
                self._try(question)

    def conclude(self, model: str) -> None:
        """Print the summary on stderr, and with `--json` the object on stdout."""
        from millpond.cli.live import summary

        usage = self._session.usage
        self._note(summary(usage))
        if self._json:
            result: dict[str, Any] = {
                "model": model,
                "policy": self._session.policy.name,
                "answers": [
                    {
                        "question": answer.question,
                        "text": answer.text,
                        "at_seconds": answer.at_seconds,
                        "first_token_seconds": answer.first_token_seconds,
                    }
                    for answer in self.answers
                ],
                "usage": usage.to_dict(),
            }
            if self.error is not None:
                result["error"] = one_line(self.error)
            print(json.dumps(result), flush=True)

    # --- the stream ---------------------------------------------------------------------------------------------

    def _stream(self, moments: list[Moment]) -> None:
        """Feed the whole source, with a stop at each moment; what was not reached is asked at the end."""
        for moment in sorted(moments, key=lambda moment: moment.seconds):
            self._feed(moment.seconds)
            if self.error is None or self._session.usage.frames_seen:
                self._try(moment.question)
        self._feed(None)

    def _feed(self, until: float | None) -> None:
        self._tap.until(until)
        while not (self._tap.ended or self._tap.stopped or self._tap.reached):
            self._tap.wait()
            try:
                self._session.feed(self._tap)
            except MillpondError as error:
                self._tap.stop()
                self._fault(error)

    def _fault(self, error: MillpondError) -> None:
        """Tell an error and go on; the first one decides the exit code."""
        if self._session.usage.frames_seen:
            self._note(f"error: {one_line(error)}")
        self.error = self.error or error

    def _tick(self) -> None:
        if self._tap.seconds is not None:
            self._line.tick()

    # --- questions ----------------------------------------------------------------------------------------------

    def _try(self, question: str) -> None:
        """Ask; a question that cannot be answered leaves the others and the stream as they are."""
        try:
            self._ask(question)
        except MillpondError as error:
            self._fault(error)

    def _ask(self, question: str) -> None:
        """Ask, and print the answer as it comes."""
        with self._speaking:
            self._line.clear()
            spoken = not self._json or self._prompt
            if spoken:
                self._say(f"{self._now()} {question}\n  ")
            pieces = self._session.stream(question, max_new_tokens=self._limit, remember=self._remember)
            try:
                while True:
                    piece = next(pieces)
                    if spoken:
                        self._say(piece)
            except StopIteration as done:
                self.answers.append(done.value)
            finally:
                if spoken:
                    self._say("\n")

    def _now(self) -> str:
        from millpond.cli.live import clock

        return f"[{clock(self._tap.seconds or 0.0)}]"

    @staticmethod
    def _say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._line.clear()
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    # --- the prompt ---------------------------------------------------------------------------------------------

    def _at_a_prompt(self, moments: list[Moment]) -> None:
        """Stream in a thread of its own and ask at a prompt here; returns when both have ended."""
        crash: list[BaseException] = []

        def stream() -> None:
            try:
                self._stream(moments)
            except BaseException as error:
                crash.append(error)
            if self._prompting:
                self._note("\nthe stream has ended; ask on, or leave with exit")

        worker = threading.Thread(target=stream, name="millpond-stream", daemon=True)
        worker.start()
        while (question := self._read_question()) is not None:
            if not question:
                continue
            self._tap.hold()
            try:
                self._ask(question)
            except MillpondError as error:
                self._note(f"error: {one_line(error)}")
            finally:
                self._tap.release()
        while worker.is_alive():
            worker.join(timeout=0.1)  # in slices, so that Ctrl-C is heard
        if crash:
            raise crash[0]

    def _read_question(self) -> str | None:
        """One line from the terminal; None when no more questions will come."""
        if self._interrupted:
            return None
        if not self._quiet:
            sys.stderr.write(f"{self._now()} > ")
            sys.stderr.flush()
        try:
            self._prompting = True
            line = input().strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            return None
        finally:
            self._prompting = False
        if line in ("exit", "quit"):
            self._tap.stop()
            return None
        return line

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """First Ctrl-C: end the stream and finish. Second: give up."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._tap.stop()
        if self._prompting:
            raise KeyboardInterrupt
