"""Many streams on one device: an engine's sessions beside plain ones in turn, and how long people wait as streams are added.

    OMP_NUM_THREADS=1 python bench/engine.py --out bench/results/engine.json --png docs/engine.png

- ingest: the frames of 8 Minnow streams, taken in by 8 plain sessions in turn, and by an engine's 8 at once: live (one frame after the
  other, as cameras give them), and from films (each in one call, which runs in blocks of 8 frames).
- answers: 8 answers of 64 tokens (the model's stop is ignored), one behind the other, and at once.
  Both in turns, several rounds, on the same cores: wall time, and processor time, which other jobs on the machine disturb less.
- load: 1 to 32 live streams, 2 frames a second each, and a question every 4 s each: seconds from a question to its first token, and
  from the moment at which a frame was due until it was in memory (ingest lag).
- hibernation: 1,000 sessions on the bytes of 16. Each is fed and asked, and later fed and asked again; beside each a plain session that
  was never hibernated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter, process_time, sleep
from typing import Any

import psutil

from millpond import Engine, Session, models
from millpond.engine import EngineSession
from millpond.eval import streams
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.models import Family

QUESTION, ANSWER = "Which object appeared first?", 64
SECTIONS = ("hibernation", "at_once", "load")
FPS, ASK_EVERY = 2.0, 4.0
BUDGET, SMALL = 512 << 10, 192 << 10


def film(seed: int, frames: int) -> list[Frame]:
    drawn = streams.generate(seed, groups=max(4, -(-frames // 2)), level="plain").frames()
    return [Frame(seconds, pixels) for seconds, pixels in drawn][:frames]


def at_once(runs: Sequence[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = perf_counter(), process_time()
    run()
    return perf_counter() - wall, process_time() - cpu


def compared(
    plain: list[tuple[float, float]], engine: list[tuple[float, float]], count: int, what: str
) -> dict[str, Any]:
    """How many a second, and the ratio of each round: its median, least and most."""
    result: dict[str, Any] = {"rounds": len(plain)}
    for index, kind in enumerate(("wall", "cpu")):
        ratios = [mine[index] / other[index] for mine, other in zip(plain, engine, strict=True)]
        result[f"{kind}_ratio"] = {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
        for name, rows in (("plain", plain), ("engine", engine)):
            seconds = statistics.median(row[index] for row in rows)
            result[f"{what}_a_{kind}_second_{name}"] = round(count / seconds, 1)
    return result


def one_by_one(sessions: Sequence[Any], films: Sequence[Sequence[Frame]]) -> None:
    for arriving in zip(*films, strict=True):
        for session, frame in zip(sessions, arriving, strict=True):
            session.feed(frame)


def fed_live(session: Any, frames: Sequence[Frame]) -> None:
    for frame in frames:
        session.feed(frame)


def ingest_and_answers(family: Family, count: int, frames: int, rounds: int) -> dict[str, Any]:
    """8 streams at once against as many in turn."""
    films = [film(100 + index, 2 * frames) for index in range(count)]
    halves = [each[:frames] for each in films], [each[frames:] for each in films]
    budget, tokens, same = 2 * BUDGET, 0, True
    arguments: dict[str, Any] = {"budget": budget, "reserve_tokens": 32 + ANSWER}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        what: {"plain": [], "engine": []} for what in ("ingest_live", "ingest_films", "answers")
    }
    together = {}
    for index in range(rounds):
        plain = [Session(family, **arguments) for _ in films]
        with Engine(family, stream_memory=count * budget + 4096, queue_memory=4096, share="fixed") as engine:
            sessions = [engine.open(str(each), **arguments) for each in range(count)]

            def each(run: Callable[[Any, Any], Any], films: Any, sessions: Any = sessions) -> None:
                at_once([partial(run, one, given) for one, given in zip(sessions, films, strict=True)])

            def ask(session: Any, _: Any) -> Any:
                return session.ask(QUESTION, max_new_tokens=ANSWER)

            runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "ingest_live": (partial(one_by_one, plain, halves[0]), partial(each, fed_live, halves[0])),
                "ingest_films": (
                    lambda plain=plain: [one.feed(given) for one, given in zip(plain, halves[1], strict=True)],
                    partial(each, lambda one, given: one.feed(given), halves[1]),
                ),
                "answers": (lambda plain=plain: [ask(one, None) for one in plain], partial(each, ask, films)),
            }
            for what, (in_turn, at_the_same_time) in runs.items():
                before = engine.usage
                both = [("plain", in_turn), ("engine", at_the_same_time)]
                for name, run in both if index % 2 else reversed(both):
                    times[what][name].append(timed(run))
                after = engine.usage
                together[what] = round((after.requests - before.requests) / (after.passes - before.passes), 2)
            mine, theirs = ([ask(one, None) for one in kind] for kind in (sessions, plain))
            tokens = sum(len(answer.token_ids) for answer in theirs)
            same &= [answer.token_ids for answer in mine] == [answer.token_ids for answer in theirs]
    measured = slice(1, None) if rounds > 1 else slice(None)  # the very first round warms up
    counts = {"ingest_live": count * frames, "ingest_films": count * frames, "answers": tokens}
    return {
        "streams": count,
        "frames_a_stream": frames,
        "requests_a_pass": together,
        "same_tokens": same,
        **{
            what: compared(
                each["plain"][measured],
                each["engine"][measured],
                counts[what],
                "tokens" if what == "answers" else "frames",
            )
            for what, each in times.items()
        },
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values)
    at = {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {name: round(value * 1e3, 1) for name, value in at.items()} | {"count": len(ordered)}


def live(family: Family, count: int, seconds: float) -> dict[str, Any]:
    """So many cameras, each with a question now and then, for so long."""
    lags: list[float] = []
    firsts: list[float] = []
    films = [film(200 + index, int(seconds * FPS)) for index in range(count)]
    with Engine(family, stream_memory=count * BUDGET + 4096, queue_memory=4096, share="fixed") as engine:
        sessions = [engine.open(str(index), budget=BUDGET) for index in range(count)]
        began = monotonic() + 0.5

        def camera(index: int, session: EngineSession) -> None:
            for number, frame in enumerate(films[index]):
                due = began + number / FPS + index / count / FPS  # cameras are not in step
                sleep(max(0.0, due - monotonic()))
                session.feed(Frame(frame.seconds, frame.pixels))
                lags.append(monotonic() - due)

        def asker(index: int, session: EngineSession) -> None:
            due = began + 1.0 + ASK_EVERY * index / count
            while due < began + seconds:
                sleep(max(0.0, due - monotonic()))
                asked = monotonic()
                pending = session.begin(QUESTION, max_new_tokens=8)
                next(iter(pending))
                firsts.append(monotonic() - asked)
                pending.wait()
                due += ASK_EVERY

        cpu = process_time()
        at_once(
            [
                lambda index=index, one=one, run=run: run(index, one)
                for index, one in enumerate(sessions)
                for run in (camera, asker)
            ]
        )
        spent, usage = process_time() - cpu, engine.usage
        took = monotonic() - began
    return {
        "streams": count,
        "seconds": round(took, 1),
        "first_token_ms": percentiles(firsts),
        "ingest_lag_ms": percentiles(lags),
        "requests_a_pass": round(usage.requests / usage.passes, 2),
        "processor_share": round(spent / took, 3),
    }


def hibernation(family: Family, count: int, room: int) -> dict[str, Any]:
    """Many sessions on the bytes of a few."""
    process, equal = psutil.Process(), 0
    expected: list[list[tuple[int, ...]]] = []
    films = [film(300 + index % 50, 24) for index in range(count)]
    before = process.memory_info().rss, process.num_fds(), threading.active_count()
    with Engine(family, stream_memory=room * SMALL + 4096, queue_memory=4096, share="fixed") as engine:
        sessions = [engine.open(str(index), budget=SMALL) for index in range(count)]
        most, waking = 0, []
        given: list[list[tuple[int, ...]]] = [[] for _ in sessions]
        middle = 0
        for visit in range(2):
            for index, session in enumerate(sessions):
                part = films[index][visit * 12 : visit * 12 + 12]
                wakes = not session.status.in_memory
                waking += [timed(session.memory)[0]] if wakes and visit else []
                session.feed(part)
                given[index].append(session.ask(QUESTION, max_new_tokens=8).token_ids)
                most = max(most, engine.usage.held_bytes)
            middle = middle or process.memory_info().rss
        end, usage = process.memory_info().rss, engine.usage
        hibernations = sum(session.status.hibernations for session in sessions)
    after = process.num_fds(), threading.active_count()
    for index, each in enumerate(films):
        alone, answers = Session(family, budget=SMALL), []
        for visit in range(2):
            alone.feed(each[visit * 12 : visit * 12 + 12])
            answers.append(alone.ask(QUESTION, max_new_tokens=8).token_ids)
        expected.append(answers)
        equal += answers == given[index]
    return {
        "sessions": count,
        "sessions_with_room": room,
        "bytes": room * SMALL + 4096,
        "held_bytes_most": most,
        "answers_equal_to_never_hibernated": f"{equal} of {count} sessions, 2 answers each",
        "hibernations": hibernations,
        "wakings": usage.wakings,
        "waking_ms": percentiles(waking),
        "rss_bytes": {"before": before[0], "after_first_visits": middle, "after_second_visits": end},
        "descriptors_left": after[0] - before[1],
        "threads_left": after[1] - before[2],
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("first_token_ms", "ingest_lag_ms"),
        ("question to first token", "ingest lag"),
        strict=True,
    ):
        for key, style in (("p50", "o-"), ("p99", "s--")):
            axes.plot([row["streams"] for row in rows], [row[name][key] for row in rows], style, label=key)
        axes.set(title=title, xlabel="live streams, 2 frames a second each", ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks([row["streams"] for row in rows], [str(row["streams"]) for row in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout gets it too")
    parser.add_argument("--png", type=Path, help="where waiting times by load are drawn")
    parser.add_argument("--streams", type=int, default=8, help="sessions at once, for ingest and answers")
    parser.add_argument("--frames", type=int, default=96, help="a stream, for each kind of ingest")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--load", default="1,2,4,8,16,32", help="numbers of live streams")
    parser.add_argument("--seconds", type=float, default=24.0, help="of each load")
    parser.add_argument("--sessions", type=int, default=1000, help="that hibernate")
    parser.add_argument(
        "--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="the others stay as they are in --out"
    )
    parser.add_argument("--room", type=int, default=16, help="sessions that have room in memory")
    options = parser.parse_args()

    family = models.load("minnow")
    result: dict[str, Any] = {
        "what": "Minnow (1.4 M parameters) on generated 64 x 64 video, many sessions on one model",
        "command": "OMP_NUM_THREADS=1 python bench/engine.py --out bench/results/engine.json --png docs/engine.png",
        "machine": describe(),
        "noise": "a shared machine with other jobs running: processor times and ratios are steadier than wall times",
        "aim": {
            "ingest": ">= 2x",
            "answers": ">= 3x",
            "hibernation": "1,000 sessions on the bytes of 16, answers equal",
        },
    }
    if options.out and options.out.exists():
        result |= {name: each for name, each in json.loads(options.out.read_text()).items() if name in SECTIONS}
    if "hibernation" in options.sections:
        result["hibernation"] = hibernation(family, options.sessions, options.room)
    if "at_once" in options.sections:
        stops, family.stop_ids = family.stop_ids, frozenset()
        result["at_once"] = ingest_and_answers(family, options.streams, options.frames, options.rounds)
        family.stop_ids = stops
    if "load" in options.sections:
        result["load"] = [live(family, int(count), options.seconds) for count in options.load.split(",")]
    text = json.dumps(result, indent=2)
    print(text)
    if options.png and "load" in result:
        draw(result["load"], options.png)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
