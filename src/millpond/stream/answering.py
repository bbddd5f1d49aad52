"""One question from its place in the queue to its answer, whoever drives it: the thread that asks, or one of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from time import perf_counter

from millpond.answer import Answer, Usage
from millpond.stream.holding import changing
from millpond.stream.ingest import Ingest
from millpond.stream.runner import Runner
from millpond.stream.turn import RememberedTurn, Turn


def answer(
    runner: Runner,
    ingest: Ingest,
    usage: Callable[[], Usage],
    question: str,
    limit: int,
    remember: bool,
    waiting: Callable[[], None],
    begins: Callable[[], None],
) -> Generator[str, None, Answer]:
    """Answer a question in pieces; returns the whole. What ends it early leaves the stream as it was.

    Args:
        runner, ingest: the stream. usage: of its session, when the answer is there.
        question, limit, remember: as in `millpond.Session.ask`.
        waiting: called when others are in front. begins: when its turn comes, before anything is done.
    """
    began = perf_counter()
    turn: Turn | None = None
    # What is remembered has its place in the stream, so the stream waits for it.
    with runner.access.stream.held(waiting) if remember else nullcontext(), runner.access.turn.held(waiting):
        try:
            while True:
                # Not around the yield: what the caller does in between is not ours to hold up or to run without gradients.
                with changing(runner):
                    if turn is None:
                        begins()
                        runner.finish_turns()
                        runner.check_model()
                        turn = (RememberedTurn if remember else Turn)(runner, ingest, question, limit)
                    piece = turn.next_piece()
                    if piece is None:
                        turn.commit()
                        break
                yield piece
        except BaseException:
            if turn is not None:
                with changing(runner):
                    turn.roll_back()
            raise
        finally:
            runner.spend("answers", perf_counter() - began)
            runner.spend("total", perf_counter() - began)
        done = turn.done
        return Answer(
            question=question,
            text=done.text,
            token_ids=tuple(done.token_ids),
            finish_reason=done.finish_reason,
            at_seconds=turn.time_us / 1e6,
            first_token_seconds=(done.first or perf_counter()) - began,
            usage=usage(),
        )
