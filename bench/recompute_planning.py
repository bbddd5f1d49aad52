"""What bench/recompute.py computes without running a model: the paper's figures, and what planning costs."""

from __future__ import annotations

import time
from typing import Any

from millpond import recompute
from millpond.recompute.closed_form import hidden_forwards, internal_forwards
from millpond.recompute.table import build_table, mixed_table

__all__ = ["planning", "theory"]


def theory() -> dict[str, Any]:
    """The figures of the paper at T = 1000, recomputed; its slots count the working state."""
    slots = (5, 10, 20, 50)
    mixed = {}
    for share in (0.01, 0.02, 0.05):
        units = round(share * 5000)
        table = mixed_table(1000, units, 1, 5)
        per_step = table.forwards(1000, units) / 1000
        mixed[f"{share:.0%}"] = {"forwards_per_step": per_step, "times_plain": (per_step + 2) / 3}
    return {
        "slots": slots,
        "hidden_forwards_per_step": [hidden_forwards(1000, m - 1) / 1000 for m in slots],
        "internal_forwards_per_step": [internal_forwards(1000, m - 1) / 1000 for m in slots],
        "headline_times_plain": (internal_forwards(1000, 49) / 1000 + 2) / 3,
        "mixed_internal_of_5_hidden": mixed,
    }


def planning() -> dict[str, Any]:
    """Processor seconds to plan, and how far a bounded search is from the optimum where both can be had."""
    seconds = {}
    for length, slots in ((1000, 50), (1000, 250), (1000, 1000), (10_000, 50), (10_000, 500), (10_000, 5000)):
        start = time.process_time()
        plan = recompute.plan(length=length, slots=slots, hidden_bytes=1, internal_bytes=7)
        seconds[f"T={length}, {slots} units"] = {
            "seconds": round(time.process_time() - start, 2),
            "exact": plan.exact,
            "forwards_per_step": plan.forwards_per_step,
        }
    gaps = {}
    for length, slots, internal in ((2000, 200, 2), (2000, 200, 5), (2000, 200, 9), (2000, 200, 20), (10_000, 40, 5)):
        start = time.process_time()
        exact = build_table(length, slots, 1, internal, window=None).counts[0, :, 1:].astype(float)
        middle = time.process_time()
        near = build_table(length, slots, 1, internal, window=16).counts[0, :, 1:]
        gaps[f"T<={length}, units<={slots}, internal {internal}"] = {
            "largest_gap": float((near / exact).max() - 1),
            "largest_gap_at_full_length": float((near[:, -1] / exact[:, -1]).max() - 1),
            "share_of_entries_at_the_optimum": float((near == exact).mean()),
            "exact_seconds": round(middle - start, 2),
            "bounded_seconds": round(time.process_time() - middle, 2),
        }
    return {"seconds": seconds, "bounded_search": gaps}
