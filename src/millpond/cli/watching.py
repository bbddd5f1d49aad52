"""One run of a session over a source: its questions, its prompt, its signals, and its way of printing."""

from __future__ import annotations

import json
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any

from millpond.cli.errors import note, one_line, say
from millpond.cli.events import EventLog
from millpond.cli.interruptible import InterruptibleSource
from millpond.cli.live import LiveLine, clock, summary
from millpond.cli.options import Moment
from millpond.cli.state import StateFile
from millpond.errors import MillpondError
from millpond.frames import Event, Losses

if TYPE_CHECKING:
    from millpond.answer import Answer
    from millpond.session import Session

# What asks a process to end: Ctrl-C, a service manager or `kill`, a terminal that goes away.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_TOLD = ("question", "text", "at_seconds", "first_token_seconds")
"""What `--json` tells of an answer."""


class Watch:
    """One run of a session over a source, with its questions, its prompt and its way of printing.

    Entered, Ctrl-C, SIGTERM and SIGHUP stop the stream instead of killing the process; a second one raises KeyboardInterrupt.

    Args:
        events: where to note what happens.
        knows: whether the model was trained on pictures like this one (pixels); None does not ask.
        arrived: what happened to the source's connection, put there by its reading thread.
        prompt: ask at a prompt on the terminal while the stream goes on in a thread of its own.
        state: where the session is saved, so that another watch can go on there.

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
        events: EventLog | None = None,
        arrived: queue.SimpleQueue[Event] | None = None,
        knows: Callable[[Any], bool] | None = None,
        state: StateFile | None = None,
    ) -> None:
        self._session = session
        self._limit, self._remember = max_new_tokens, remember
        self._json, self._quiet, self._prompt = as_json, quiet, prompt
        self.answers: list[Answer] = []
        self.error: MillpondError | None = None
        self._speaking = threading.Lock()
        self._prompting = False
        self._interrupted = False
        self._source = source
        self._events = events or EventLog(None)
        self._connection = arrived or queue.SimpleQueue()
        self._state = ""
        self._line = LiveLine(lambda: session.usage, shown=not quiet and not prompt, state=lambda: self._state)
        self._knows = knows
        self._state_file, self._unsaved = state, ""
        reached = None if state is None else state.reached
        self._frames = InterruptibleSource(source, tick=self._tick, look=self._look, seconds=reached)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        for number in _SIGNALS:
            # Who was started to outlive its terminal (nohup) goes on doing so.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._line.clear()
        self._frames.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, moments: list[Moment], questions: list[str]) -> None:
        """Watch to the end and ask everything.

        What goes wrong on the way is told at once and kept in `error`; what had been seen before is still asked about.

        Raises:
            MillpondError: a question cannot be asked of this model, or the source gave nothing at all.
        """
        for question in (*(moment.question for moment in moments), *questions):
            self._check(question)
        with self._line:
            if self._prompt:
                self._at_a_prompt(moments)
            else:
                self._stream(moments)
            if self.error is not None and not self._session.usage.frames_seen:
                raise self.error
            self._tell_connection()
            if self._interrupted:
                self._note("stopped")
                self._events.write("stopped", stream_seconds=self._frames.seconds)
            for question in questions:
                self._try(question)
            self._save(now=True)

    def conclude(self, model: str) -> None:
        """Print the summary on stderr, and with `--json` the object on stdout."""
        usage = self._session.usage
        self._tell_connection()
        losses = self._losses()
        self._note(summary(usage, losses))
        self._events.write("end", stream_seconds=usage.stream_seconds, frames=usage.frames_seen, losses=asdict(losses))
        if self._json:
            result: dict[str, Any] = {
                "model": model,
                "policy": self._session.policy.name,
                "answers": [{name: getattr(answer, name) for name in _TOLD} for answer in self.answers],
                "losses": asdict(losses),
                "usage": usage.to_dict(),
            }
            if self.error is not None:
                result["error"] = one_line(self.error)
            say(json.dumps(result) + "\n")

    # --- the stream ---------------------------------------------------------------------------------------------

    def _stream(self, moments: list[Moment]) -> None:
        """Feed the whole source, with a stop at each moment; what was not reached is asked at the end."""
        for moment in sorted(moments, key=lambda moment: moment.seconds):
            self._feed(moment.seconds)
            if self._frames.ended and self._frames.until_seconds < moment.seconds and not self._frames.reached:
                last = clock(self._frames.seconds or 0.0)
                self._note(f"the stream ended at {last}, before {moment.seconds:g} s: asked of what there was")
            if self.error is None or self._session.usage.frames_seen:
                self._try(moment.question)
        self._feed(None)

    def _feed(self, until: float | None) -> None:
        self._frames.until(until)
        if self._frames.ended or self._frames.stopped:
            return
        try:
            self._session.feed(self._frames)
        except MillpondError as error:
            self._frames.stop()
            self._tell_connection()  # what led to it
            self._fault(error)

    def _fault(self, error: MillpondError) -> None:
        """Tell an error and go on; the first one decides the exit code."""
        if self._session.usage.frames_seen:
            self._note(f"error: {one_line(error)}")
        self._events.write("error", stream_seconds=self._frames.seconds, message=one_line(error))
        self.error = self.error or error

    def _look(self, frame: Any) -> None:
        """Say it once where the model cannot know what it is shown."""
        if self._knows is not None and not self._knows(frame.pixels):
            self._knows = None
            self._events.write("unfamiliar", stream_seconds=frame.seconds)
            self._note(
                "this model only knows its own generated streams, and this picture is nothing like them: its answers will mean "
                "nothing; name another with --model"
            )

    def _losses(self) -> Losses:
        return getattr(self._source, "losses", Losses())

    def _tell_connection(self) -> None:
        """Say what the reading thread has noted meanwhile."""
        while not self._connection.empty():
            event = self._connection.get()
            self._events.write(event.kind, stream_seconds=event.seconds, **_details(event))
            if event.kind == "lost":
                self._state = "lost"
                self._note(f"lost at {clock(event.seconds)}: {event.reason}")
            elif event.kind == "retry":
                self._state = f"lost, attempt {event.attempt}"
                self._note(f"trying again, attempt {event.attempt}")
            else:
                self._state = ""
                self._note(f"back after {event.gap:.1f} s, attempt {event.attempt}")

    def _save(self, *, now: bool = False) -> None:
        """Save the session when it is time to; the stream goes on without, and it is said once."""
        if self._state_file is not None:
            try:
                self._state_file.save(self._session, now=now)
                self._unsaved = ""
            except MillpondError as error:
                if str(error) != self._unsaved:
                    self._unsaved = str(error)
                    self._fault(error)

    def _tick(self) -> None:
        self._tell_connection()
        if self._frames.seconds is not None:
            self._save()
            self._line.tick()

    # --- questions ----------------------------------------------------------------------------------------------

    def _check(self, question: str) -> None:
        """Raise for a question that could never be asked, before an hour has been watched for it."""
        if not question.strip():
            raise MillpondError("a question is empty")
        self._session.family.question(question, after_video=True)

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
                say(f"{self._now()} {question}\n  ")
            pieces = self._session.stream(question, max_new_tokens=self._limit, remember=self._remember)
            try:
                while True:
                    piece = next(pieces)
                    if spoken:
                        say(piece)
            except StopIteration as done:
                answer = done.value
                self.answers.append(answer)
                told = {"question": answer.question, "text": answer.text}
                self._events.write("answer", stream_seconds=answer.at_seconds, **told)
            finally:
                if spoken:
                    say("\n")

    def _now(self) -> str:
        return f"[{clock(self._frames.seconds or 0.0)}]"

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._line.clear()
            note(text)

    # --- the prompt ---------------------------------------------------------------------------------------------

    def _at_a_prompt(self, moments: list[Moment]) -> None:
        """Stream in a thread of its own, which goes on while an answer is printed, and ask at a prompt here; returns when both have ended."""
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
            try:
                self._ask(question)
            except MillpondError as error:
                self._note(f"error: {one_line(error)}")
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
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            self._prompting = False
        if line in ("exit", "quit"):
            self._frames.stop()
            return None
        return line

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first signal: end the stream and finish. The second: give up."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._frames.stop()
        if self._prompting:
            raise KeyboardInterrupt


def _details(event: Event) -> dict[str, Any]:
    """What is known of an event beside its kind and time."""
    known = {"attempt": event.attempt, "gap_seconds": round(event.gap, 3), "reason": event.reason}
    return {name: value for name, value in known.items() if value}
