"""From answers to figures: for each arm the official score, what it cost, and what was left out. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from millpond.eval.benchmarks.answers import write_json
from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark
from millpond.eval.benchmarks.judge import verdicts
from millpond.eval.benchmarks.run import asked_of
from millpond.eval.benchmarks.watch import Pass
from millpond.memory.budget import format_bytes


def summarise(
    benchmark: Benchmark,
    annotations: Annotations,
    passes: dict[tuple[str, str], Pass],
    names: Sequence[str],
    folder: Path,
    judge: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each arm.

    Args:
        names: of the arms, in the order of the rows.
        folder: where a judge's verdicts lie. judge: name of the judge model.
    """
    return [_row(benchmark, annotations, passes, name, folder, judge) for name in names]


def answered(
    benchmark: Benchmark,
    annotations: Annotations,
    passes: dict[tuple[str, str], Pass],
    name: str,
    folder: Path,
    judge: str | None,
) -> list[Answered]:
    """What an arm has answered, in the annotations' order."""
    pairs = [pair for video in annotations.videos for pair in asked_of(video, passes.get((video.id, name)))]
    said = verdicts(folder, judge, pairs) if benchmark.judged else [None] * len(pairs)
    return [Answered(query, text, verdict) for (query, text), verdict in zip(pairs, said, strict=True)]


def _row(
    benchmark: Benchmark,
    annotations: Annotations,
    passes: dict[tuple[str, str], Pass],
    name: str,
    folder: Path,
    judge: str | None,
) -> dict[str, Any]:
    replies = answered(benchmark, annotations, passes, name, folder, judge)
    score = benchmark.score(replies)
    seen = [
        found for video in annotations.videos if (found := passes.get((video.id, name))) is not None and found.frames
    ]
    seconds, intervals = sum(one.seconds for one in seen), sum(one.frames - 1 for one in seen)
    left_out: dict[str, int] = {}
    for fault in annotations.faults:
        left_out[fault.kind] = left_out.get(fault.kind, 0) + fault.questions
    for video in annotations.videos:
        found = passes.get((video.id, name))
        answers = {query.id for query, _ in asked_of(video, found)}
        if short := sum(query.after_yes is None and query.id not in answers for query in video.queries):
            why = "not asked yet"
            if found is not None:
                why = "does not fit" if found.refused else "broken video" if found.broken else "refused question"
            left_out[why] = left_out.get(why, 0) + short
    return {
        "policy": name,
        "total": None if score.total is None else round(score.total, 4),
        "parts": {part: {**asdict(figure), "value": round(figure.value, 4)} for part, figure in score.parts.items()},
        "note": score.note,
        "asked": sum(one.query.after_yes is None for one in replies),
        "unreadable": score.unreadable,
        "left_out": left_out,
        "videos": len(seen),
        "frames": sum(one.frames for one in seen),
        "effective_fps": round(intervals / seconds, 4) if seconds else None,
        "budget_bytes": next((one.budget_bytes for one in seen), None),
        "peak_bytes": max((one.peak_bytes for one in seen), default=0),
        "full_cache_bytes": max((one.full_cache_bytes for one in seen), default=0),
        "memory_tokens": round(sum(one.memory_tokens for one in seen) / len(seen), 1) if seen else 0,
        "compactions": sum(one.compactions for one in seen),
        "seconds_spent": round(sum(one.seconds_spent for one in seen), 1),
    }


def write(folder: Path, result: dict[str, Any], title: str) -> None:
    """`results.json` and `results.md` in the folder; the rows are the result's "rows"."""
    write_json(folder / "results.json", result)
    (folder / "results.md").write_text(markdown(result["rows"], title), encoding="utf-8")


def markdown(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Two tables: a row an arm with its total and cost, and a column an arm with its parts. What is missing stands below."""
    head = ["policy", "total", "asked", "budget", "peak", "full cache", "memory tokens", "effective fps", "frames"]
    lines = [title, "", _line(head), _line(["---"] * len(head))]
    for row in rows:
        budget = "no cap" if row["budget_bytes"] is None else format_bytes(row["budget_bytes"])
        total = "-" if row["total"] is None else f"{row['total']:.2f}"
        fps = "-" if row["effective_fps"] is None else f"{row['effective_fps']:.2f}"
        sizes = [format_bytes(row["peak_bytes"]), format_bytes(row["full_cache_bytes"])]
        lines.append(
            _line(
                [
                    row["policy"],
                    total,
                    str(row["asked"]),
                    budget,
                    *sizes,
                    f"{row['memory_tokens']:.0f}",
                    fps,
                    str(row["frames"]),
                ]
            )
        )
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    if names:
        lines += ["", _line(["", *(row["policy"] for row in rows)]), _line(["---"] * (len(rows) + 1))]
        lines += [_line([name, *(_figure(row["parts"].get(name)) for row in rows)]) for name in names]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in _notes(row):
            notes.setdefault(note, []).append(row["policy"])
    said = [f"{', '.join(names) if len(names) < len(rows) else 'all'}: {note}" for note, names in notes.items()]
    return "\n".join([*lines, *([""] if said else []), *said]) + "\n"


def _notes(row: dict[str, Any]) -> list[str]:
    found = [row["note"]] if row["note"] else []
    if row["unreadable"]:
        found.append(f"{row['unreadable']} answers name no choice")
    if row["left_out"]:
        found.append("left out: " + ", ".join(f"{count} ({why})" for why, count in row["left_out"].items()))
    return found


def _figure(part: dict[str, Any] | None) -> str:
    return "-" if part is None else f"{part['value']:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
