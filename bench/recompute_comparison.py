"""All methods of bench/recompute.py side by side in one process: peak bytes, gradients, times."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from recompute_measuring import Seconds, peak_bytes, timed
from recompute_methods import Task, package_schedules, run_forward, run_plain, run_planned, run_schedule, run_sqrt

from millpond import recompute

__all__ = ["compare"]

BACKWARD_FORWARDS = 2  # what the paper takes a backward to cost


def compare(task: Task, repeats: int) -> dict[str, Any]:
    """Every method: peak bytes once, then times in interleaved repetitions."""
    size = recompute.measure(task.step, task.inputs[0], task.state)
    full = task.length * size.internal_bytes
    root = round(math.sqrt(task.length))
    stretches = math.ceil(task.length / root)
    last = task.length - (stretches - 1) * root
    runs: dict[str, Callable[[], None]] = {"plain": lambda: run_plain(task), "sqrt(T)": lambda: run_sqrt(task)}
    facts: dict[str, dict[str, Any]] = {
        "plain": {"forwards": task.length, "budget_bytes": None},
        "sqrt(T)": {"forwards": 2 * task.length - last, "budget_bytes": None},
    }
    # A twentieth less than what checkpointing takes, because a budget does not cover the gradients of activations.
    at_sqrt = round(0.95 * peak_bytes(runs["sqrt(T)"], task.cell))
    budgets = {"1%": full // 100, "2%": full // 50, "5%": full // 20, "memory of sqrt(T)": at_sqrt}
    for name, strategy in [*((name, "auto") for name in budgets), ("2%", "hidden"), ("5%", "internal")]:
        budget = budgets[name]
        start = time.perf_counter()
        plan = recompute.plan(
            length=task.length,
            budget=budget,
            strategy=strategy,
            hidden_bytes=size.hidden_bytes,
            internal_bytes=size.internal_bytes,
        )
        label = f"millpond {strategy}, {name}"
        facts[label] = {
            "forwards": plan.forwards,
            "budget_bytes": budget,
            "planned_peak_bytes": plan.peak_bytes,
            "planning_seconds": round(time.perf_counter() - start, 3),
        }
        runs[label] = lambda budget=budget, strategy=strategy: run_planned(task, budget, strategy)
    for label, made in package_schedules(task, size, full).items():
        actions = made.pop("actions")
        facts[label] = {**made, "budget_bytes": int(made.pop("share") * full)}
        runs[label] = lambda actions=actions: run_schedule(task, actions)

    gradients = {}
    for label, run in runs.items():
        facts[label]["peak_bytes"] = peak_bytes(run, task.cell)
        gradients[label] = [parameter.grad.clone() for parameter in task.cell.parameters()]
    for label, found in gradients.items():
        pairs = zip(found, gradients["plain"], strict=True)
        error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        facts[label]["gradient_error"] = error
        if error > 1e-4:
            raise SystemExit(f"{label}: gradients differ from plain backpropagation by {error:.1e}")

    taken: dict[str, list[Seconds]] = {label: [] for label in [*runs, "forward"]}
    order = [*runs, "forward"]
    runs["forward"] = lambda: run_forward(task)
    for repetition in range(repeats):  # all methods are warm: each has run once for its peak
        random.Random(repetition).shuffle(order)
        for label in order:
            taken[label].append(timed(runs[label], task.cell))
    for label, fact in facts.items():
        fact["forwards_per_step"] = fact["forwards"] / task.length
        fact["times_plain_by_the_paper"] = (fact["forwards_per_step"] + BACKWARD_FORWARDS) / (1 + BACKWARD_FORWARDS)
        fact["memory_saved"] = 1 - fact["peak_bytes"] / facts["plain"]["peak_bytes"]
        extra = fact["forwards"] / task.length - 1
        for clock in ("wall", "processor"):
            own, plain, forward, root_t = (
                [getattr(seconds, clock) for seconds in taken[name]] for name in (label, "plain", "forward", "sqrt(T)")
            )
            predicted = [p + extra * f for p, f in zip(plain, forward, strict=True)]
            fact[clock] = {
                "seconds": own,
                "times_plain": median_ratio(own, plain),
                "times_sqrt": median_ratio(own, root_t),
                "times_predicted": median_ratio(own, predicted),
            }
    ratios = [(p.processor - f.processor) / f.processor for p, f in zip(taken["plain"], taken["forward"], strict=True)]
    return {
        "hidden_bytes": size.hidden_bytes,
        "internal_bytes": size.internal_bytes,
        "plain_bytes_by_the_model": full,
        "forward_processor_seconds": [seconds.processor for seconds in taken["forward"]],
        "backward_in_forwards": statistics.median(ratios),
        "methods": facts,
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Over repetitions, each divided by its neighbour of the same repetition."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
