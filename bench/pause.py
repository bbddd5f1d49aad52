"""How long the intake of frames pauses while an answer streams to a slow reader.

    OMP_NUM_THREADS=1 python bench/pause.py --out bench/results/pause.json

Minnow watches a camera that gives frames at a steady rate. In every round, in turns: an answer alone; the camera alone; the camera while
an answer of 256 tokens streams to a reader that takes 50 ms over every piece; the same with a remembered turn, which has its place in
the stream, so that frames wait for it; and the first with a camera so fast that the headroom is used up and a compaction waits for
the answer. A pause is the time from handing a frame to the session until it asks for the next. The aim: the
longest pause beside an answer is at most the longest block of frames and the longest step of an answer, each as found without the other.

Both by the wall clock and in processor time of the process. The machine is shared, and a wall clock counts what other jobs take; only one
thread is at the model at a time, so processor time is what a pause would be without them. That nobody waits for the reader,
who only sleeps, is for the wall clock to show.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from millpond import Answer, PendingAnswer, Session
from millpond.eval import streams
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.models import load
from millpond.stream.turn import Turn

QUESTION = "What was seen first, and what came after it?"
READING_SECONDS = 0.05
T = TypeVar("T")


@dataclass
class Spent:
    """What something took, in ms.

    Attributes:
        wall: by the wall clock. cpu: processor time of the process.
    """

    wall: float
    cpu: float


@contextmanager
def spent(times: list[Spent]) -> Iterator[None]:
    wall, cpu = perf_counter(), process_time()
    yield
    times.append(Spent((perf_counter() - wall) * 1e3, (process_time() - cpu) * 1e3))


def longest(times: list[Spent]) -> dict[str, float]:
    return {"wall_ms": round(max(one.wall for one in times), 2), "cpu_ms": round(max(one.cpu for one in times), 2)}


@dataclass
class Camera:
    """Frames at a steady rate, as long as it is wanted; notes what each of them took to be taken."""

    pictures: list[np.ndarray]
    fps: float
    start: float
    dropped: int = 0
    pauses: list[Spent] = field(default_factory=list)
    off: threading.Event = field(default_factory=threading.Event)

    def __iter__(self) -> Iterator[Frame]:
        began = perf_counter()
        while not self.off.wait(max(0.0, began + len(self.pauses) / self.fps - perf_counter())):
            at = len(self.pauses)
            with spent(self.pauses):
                yield Frame(self.start + at / self.fps, self.pictures[at % len(self.pictures)])


def watched(
    session: Session, pictures: list[np.ndarray], fps: float, begin: Callable[[], T], during: Callable[[T], Any]
) -> tuple[list[Spent], Any]:
    """The pauses of a camera that is switched on when something has begun, while it goes on; and what that gave."""
    camera = Camera(pictures, fps, session.usage.stream_seconds + 1)
    feeder = threading.Thread(target=session.feed, args=(camera,))
    begun = begin()
    feeder.start()
    try:
        found = during(begun)
    finally:
        camera.off.set()
        feeder.join()
    return camera.pauses, found


def read_slowly(answer: PendingAnswer) -> tuple[Answer, float]:
    """An answer, and the seconds until its reader has read it."""
    began = perf_counter()
    for _ in answer:
        time.sleep(READING_SECONDS)
    return answer.result(), perf_counter() - began


def answered(session: Session, tokens: int) -> tuple[Answer, list[Spent]]:
    """An answer with nothing beside it, and what each step took: the question's, then one a token."""
    next_piece, steps = Turn.next_piece, []

    def timed(turn: Turn) -> str | None:
        with spent(steps):
            return next_piece(turn)

    Turn.next_piece = timed  # type: ignore[method-assign]
    try:
        return session.ask(QUESTION, max_new_tokens=tokens), steps
    finally:
        Turn.next_piece = next_piece  # type: ignore[method-assign]


def one_round(base: Session, pictures: list[np.ndarray], fps: float, tokens: int) -> dict[str, Any]:
    alone, steps = answered(base.fork(), tokens)
    rest, _ = watched(base.fork(), pictures, fps, lambda: None, lambda _: time.sleep(8))

    def asked(fps: float, *, remember: bool = False) -> tuple[list[Spent], tuple[Answer, float]]:
        session = base.fork()
        begin = partial(session.begin, QUESTION, max_new_tokens=tokens, remember=remember)
        return watched(session, pictures, fps, begin, read_slowly)

    beside, (answer, reading) = asked(fps)
    due, _ = asked(20 * fps)
    kept, _ = asked(fps, remember=True)
    return {
        "answer_tokens": len(answer.token_ids),
        "answer_is_that_at_rest": answer.token_ids == alone.token_ids,
        "reader_seconds": round(reading, 2),
        "frames_beside_the_answer": len(beside),
        "compactions_beside_the_answer": answer.usage.compactions - base.usage.compactions,
        "longest_block_alone": longest(rest),
        "longest_step_alone": longest(steps),
        "median_step_alone_cpu_ms": round(statistics.median(step.cpu for step in steps), 2),
        "longest_pause_beside_an_answer": longest(beside),
        "longest_pause_where_a_compaction_falls_due": longest(due),
        "longest_pause_beside_a_remembered_turn": longest(kept),
    }


def ratios(rounds: list[dict[str, Any]], clock: str) -> dict[str, float]:
    """The longest pause over the longest block and the longest step: of all rounds, and the median of each round's own."""

    def found(name: str) -> list[float]:
        return [one[name][clock] for one in rounds]

    pauses, blocks, steps = map(found, ("longest_pause_beside_an_answer", "longest_block_alone", "longest_step_alone"))
    own = [pause / (block + step) for pause, block, step in zip(pauses, blocks, steps, strict=True)]
    return {
        "of_all": round(max(pauses) / (max(blocks) + max(steps)), 3),
        "median_of_rounds": round(statistics.median(own), 3),
        "most_of_a_round": round(max(own), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--budget", default="16MiB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    family = load("minnow")
    family.stop_ids = frozenset()  # answers as long as they may be
    shown = list(streams.generate(5, groups=64).frames())
    pictures = [picture for _, picture in shown]
    base = Session(family, budget=arguments.budget, reserve_tokens=arguments.tokens + 64)
    while base.usage.compactions == 0:  # behind one there is headroom for the frames of an answer
        base.feed(shown[:8])
    rounds = [one_round(base, pictures, arguments.fps, arguments.tokens) for _ in tqdm(range(arguments.rounds))]
    found = {
        "what": f"Minnow, {arguments.fps:g} frames a second, beside an answer of {arguments.tokens} tokens to a reader that takes "
        f"{READING_SECONDS * 1e3:g} ms a piece",
        "command": "OMP_NUM_THREADS=1 python bench/pause.py --out bench/results/pause.json",
        "machine": describe(),
        "noise": "a shared machine with other jobs running: processor time is steadier than the wall clock",
        "aim": "the longest pause over the longest block and the longest step: at most 1",
        "policy": base.policy.name,
        "plan": base.plan.to_dict(),
        "longest_pause_over_block_and_step": {clock: ratios(rounds, clock) for clock in ("cpu_ms", "wall_ms")},
        "rounds": rounds,
    }
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
