"""Asking several questions about one instant of a stream: what they are shown is run once, each answer is rolled back.

Every answer is bit-identical to that of `millpond.Session.ask` at the same moment, because every question runs behind the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from millpond.answer import Answer, Usage
from millpond.errors import MillpondError
from millpond.standing.questions import Asked, Wanted
from millpond.stream.generate import Generated, generate
from millpond.stream.holding import changing
from millpond.stream.ingest import Ingest
from millpond.stream.pending_answer import PendingAnswer
from millpond.stream.runner import Runner
from millpond.stream.shown import Shown
from millpond.stream.step import Step
from millpond.stream.stored_tokens import dated


@dataclass(frozen=True)
class Stream:
    """A session's stream, and the session's usage."""

    runner: Runner
    ingest: Ingest
    usage: Callable[[], Usage]


@dataclass(frozen=True)
class _Answered:
    """Questions that have been answered in the thread that asked."""

    each: Sequence[Answer | Exception]
    done: bool = True

    def outcomes(self) -> Sequence[Answer | Exception]:
        return self.each


@dataclass(frozen=True)
class Begun:
    """Questions that are being answered in threads of their own, while the stream goes on."""

    pending: Sequence[PendingAnswer]

    @property
    def done(self) -> bool:
        """All have ended."""
        return all(each.done for each in self.pending)

    def outcomes(self) -> Sequence[Answer | Exception]:
        """What came of them; waits for those that have not ended."""
        return [_outcome(each) for each in self.pending]


def _outcome(pending: PendingAnswer) -> Answer | Exception:
    try:
        return pending.result()
    except Exception as error:
        return error


def ask_together(stream: Stream, wanted: Sequence[Wanted]) -> Asked:
    """Ask them one after the other; one that fails leaves the others and the stream as they are.

    Where the frames that wait for their block would not fit beside the turn's reserve, the memory is compacted now rather than when
    their block is full.
    """
    runner = stream.runner
    with runner.access.turn.held():
        began = perf_counter()
        given: list[Generated | Exception] = []
        turn: _SharedTurn | None = None
        try:
            with changing(runner):
                runner.finish_turns()
                runner.check_model()
                turn = _SharedTurn(stream)
                faults = turn.show([question for question, _ in wanted])
            for (question, limit), fault in zip(wanted, faults, strict=True):
                given.append(fault or turn.answer(question, limit))
            with changing(runner):
                turn.roll_back()
        except BaseException as error:
            if turn is not None:
                with changing(runner):
                    turn.roll_back()
            if not isinstance(error, Exception):
                raise
            given.extend([error] * (len(wanted) - len(given)))
        finally:
            runner.spend("answers", perf_counter() - began)
        at_seconds, usage = (stream.ingest.at.last_us or 0) / 1e6, stream.usage()
    return _Answered(
        [
            each
            if isinstance(each, Exception)
            else Answer(
                question=question,
                text=each.text,
                token_ids=tuple(each.token_ids),
                finish_reason=each.finish_reason,
                at_seconds=at_seconds,
                first_token_seconds=(each.first or perf_counter()) - began,
                usage=usage,
            )
            for (question, _), each in zip(wanted, given, strict=True)
        ]
    )


class _SharedTurn(Step):
    """A turn of several questions, none of which sees another; begun when made, and always rolled back."""

    _ingest: Ingest

    def __init__(self, stream: Stream) -> None:
        self._shown = Shown.now(stream.runner, stream.ingest)
        super().__init__(stream.runner, stream.ingest)

    def show(self, questions: Sequence[str]) -> list[Exception | None]:
        """Run what the questions are shown; for each of them None, or why it cannot be asked."""
        faults: list[Exception | None] = []
        for question in questions:
            try:
                self._shown.ensure_capacity(self._runner, question)
                faults.append(None)
            except MillpondError as error:
                faults.append(error)
        if None in faults:
            self._shown.run(self._runner, self._ingest)
        return faults

    def answer(self, question: str, limit: int) -> Generated | Exception:
        """Run one question, which fits, to the end of its answer, and take both back; what goes wrong is given in its place."""
        runner, time_us = self._runner, self._shown.time_us
        behind, clock = runner.pond.length, replace(runner.clock)
        try:
            with changing(runner):
                asked = runner.family.question(question, after_video=self._shown.after_video)
                hidden = runner.ask(dated(asked, time_us))
                pieces = generate(runner, runner.run, hidden, time_us, limit=limit, run_last=False)
                del hidden
            while True:
                with changing(runner):
                    next(pieces)
        except StopIteration as ended:
            done: Generated = ended.value
            return done
        except Exception as error:
            return error
        finally:
            with changing(runner):
                runner.roll_back(behind, clock)
