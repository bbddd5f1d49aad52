"""From outcomes to figures: accuracy with intervals per cell, question type and age. Knows nothing about models or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from millpond.eval.accuracy.cell import Cell
from millpond.eval.accuracy.intervals import clustered, holm
from millpond.eval.accuracy.pairing import paired
from millpond.eval.accuracy.trial import Mark, Outcome
from millpond.memory.budget import format_bytes
from millpond.policies import DEFAULT_POLICY

AGES = (4.0, 16.0, 64.0, 256.0, 1024.0)
"""Upper bounds in seconds of the classes of age, from an event to its question; above the last there is one more."""
PAST_SECONDS = 16.0
"""A question is about the past when its event began at least this long ago."""


def summarise(cells: Sequence[Cell], outcomes: Iterable[Outcome], questions: Sequence[str]) -> list[dict[str, Any]]:
    """One row per cell, in the order of `cells`: accuracy over all questions, per question type, per age, and what it cost.

    Intervals are clustered by stream (`millpond.eval.accuracy.intervals`). Seconds are medians over the streams. Where the default policy
    was measured under the same budget, `against_default` compares the two on the same questions; its `p_holm` is adjusted for all
    comparisons of the table.
    """
    by_cell: dict[str, dict[int, Outcome]] = {cell.name: {} for cell in cells}
    for outcome in outcomes:
        if outcome.cell in by_cell:
            by_cell[outcome.cell][outcome.seed] = outcome
    rows = []
    for cell in cells:
        row = _row(cell, list(by_cell[cell.name].values()), questions)
        default = replace(cell, policy=DEFAULT_POLICY, recent_frames=0).name
        if row["streams"] and cell.name != default and by_cell.get(default):
            row["against_default"] = asdict(paired(by_cell[cell.name], by_cell[default]))
        rows.append(row)
    duels = [row["against_default"] for row in rows if "against_default" in row]
    for duel, p in zip(duels, holm([duel["p"] for duel in duels]), strict=True):
        duel["p_holm"] = round(p, 6)
    return rows


def _row(cell: Cell, outcomes: list[Outcome], questions: Sequence[str]) -> dict[str, Any]:
    seen = [outcome for outcome in outcomes if outcome.refused is None]
    row: dict[str, Any] = {
        "policy": cell.policy,
        "budget": cell.budget_name,
        "positions": cell.positions,
        "recent_frames": cell.recent_frames,
        "streams": len(seen),
        "refused": next((outcome.refused for outcome in outcomes if outcome.refused), None),
    }
    if not seen:
        return row
    row |= {
        "all": _share(seen),
        "past": _share(seen, lambda mark: mark.age is not None and mark.age >= PAST_SECONDS),
        # Called so in every result that is stored.
        "families": {name: _share(seen, lambda mark, name=name: mark.type == name) for name in questions},  # type: ignore[misc]
        "ages": {
            label: _share(seen, lambda mark, low=low, high=high: mark.age is not None and low <= mark.age < high)  # type: ignore[misc]
            for label, low, high in _age_classes()
        },
        "budget_bytes": seen[0].budget_bytes,
        "full_cache_bytes": seen[0].full_cache_bytes,
        "peak_bytes": max(outcome.peak_bytes for outcome in seen),
        "scratch_bytes": max(outcome.scratch_bytes for outcome in seen),
        "memory_tokens": round(fmean(outcome.memory_tokens for outcome in seen), 1),
        "compactions": round(fmean(outcome.compactions for outcome in seen), 1),
        "seconds_compaction": round(median(outcome.seconds_compaction for outcome in seen), 4),
        "seconds_decoder": round(median(outcome.seconds_decoder for outcome in seen), 4),
    }
    return row


def _share(seen: Iterable[Outcome], belongs: Callable[[Mark], bool] = lambda mark: True) -> dict[str, Any]:
    chosen = [[mark.right for mark in outcome.marks if belongs(mark)] for outcome in seen]
    return asdict(clustered([(sum(marks), len(marks)) for marks in chosen]))


def _age_classes() -> list[tuple[str, float, float]]:
    bounds = (0.0, *AGES, math.inf)
    labels = [f"under {AGES[0]:g} s", *(f"{a:g}-{b:g} s" for a, b in pairwise(AGES))]
    return list(zip([*labels, f"from {AGES[-1]:g} s"], bounds[:-1], bounds[1:], strict=True))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Three tables: overall, by question type, by age. Per cent, with the 95 % interval where there is room."""
    shown = [row for row in rows if row["streams"]]
    parts = [_overall(rows)]
    for key, title in (("families", "By question"), ("ages", "By seconds from the event to the question")):
        columns = [name for name in (shown[0][key] if shown else {}) if any(row[key][name]["asked"] for row in shown)]
        lines = [f"\n{title}:\n", _line(["policy", "budget", *columns]), _line(["---"] * (2 + len(columns)))]
        lines += [
            _line([_policy(row), row["budget"], *(_percent(row[key][name]) for name in columns)]) for row in shown
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _overall(rows: Sequence[dict[str, Any]]) -> str:
    head = ["policy", "budget", "streams", "all", "95 %", "past", "95 %", f"against {DEFAULT_POLICY}: won, lost"]
    head += ["p (Holm)", "peak", "scratch", "memory tokens", "compaction, s", "/ decoder"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        if not row["streams"]:
            lines.append(_line([_policy(row), row["budget"], "refused", *[""] * (len(head) - 3)]))
            continue
        spent = row["seconds_compaction"] / max(row["seconds_decoder"], 1e-9)
        cost = [format_bytes(row["peak_bytes"]), format_bytes(row["scratch_bytes"]), f"{row['memory_tokens']:.0f}"]
        cost += [f"{row['seconds_compaction']:.2f}", f"{spent:.2f}"]
        shares = [text for key in ("all", "past") for text in (_percent(row[key]), _interval(row[key]))]
        duel = row.get("against_default")
        won = f"{duel['won']}, {duel['lost']}" if duel else ""
        p = _chance(duel["p_holm"]) if duel else ""
        lines.append(_line([_policy(row), row["budget"], str(row["streams"]), *shares, won, p, *cost]))
    return "\n".join(lines)


def _policy(row: dict[str, Any]) -> str:
    marks = [] if row["positions"] == "contiguous" else [row["positions"]]
    marks += [f"{row['recent_frames']} recent frames"] if row["recent_frames"] else []
    return f"{row['policy']} ({', '.join(marks)})" if marks else row["policy"]


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: dict[str, Any]) -> str:
    return f"{100 * share['share']:.1f}" if share["asked"] else "-"


def _interval(share: dict[str, Any]) -> str:
    return f"{100 * share['low']:.1f}-{100 * share['high']:.1f}"
