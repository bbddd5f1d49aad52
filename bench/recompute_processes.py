"""Every method of bench/recompute.py in a process of its own, its memory seen from outside."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from recompute_measuring import machine, timed
from recompute_methods import Task, run_forward, run_plain, run_planned, run_sqrt

from millpond import recompute

__all__ = ["one_process", "processes", "shape_of"]

BENCH = Path(__file__).with_name("recompute.py")

SHARES = (0.01, 0.05, 0.2)


def one_process(task: Task, name: str) -> dict[str, Any]:
    """In a child: run one method once. A plan is made before the clock starts, as it is kept for later runs.

    Every child imports what an optimiser would (torch's compiler, about 70 MiB), so that no method is charged for it.
    What is there by then is out of the cycle collector's sight, so that it looks through what a run leaves behind often:
    checkpoint's closures hold tensors in cycles, which otherwise stay for most of the run.
    """
    torch.optim.SGD(task.cell.parameters())
    gc.freeze()
    gc.collect()
    size = recompute.measure(task.step, task.inputs[0], task.state)
    full = task.length * size.internal_bytes
    facts: dict[str, Any] = {"plain_bytes_by_the_model": full}
    runs = {"forward only": run_forward, "plain": run_plain, "sqrt(T)": run_sqrt}
    if name in runs:
        seconds = timed(lambda: runs[name](task), task.cell)
    else:
        budget = round(float(name) * full)
        sizes = {"hidden_bytes": size.hidden_bytes, "internal_bytes": size.internal_bytes}
        plan = recompute.plan(length=task.length, budget=budget, **sizes)
        facts |= {"budget_bytes": budget, "planned_peak_bytes": plan.peak_bytes, "forwards": plan.forwards}
        seconds = timed(lambda: run_planned(task, budget, "auto"), task.cell)
    return {**facts, "processor_seconds": seconds.processor}


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Every method in a process of its own; resident memory seen from outside.

    The processes of a repetition run side by side, so that whatever else the machine does slows all of them.
    """
    names = ["forward only", "plain", "sqrt(T)", *map(str, SHARES)]
    shape = ["--length", str(options.length), "--batch", str(options.batch), "--width", str(options.width)]
    methods: dict[str, dict[str, Any]] = {name: {"resident_bytes": [], "processor_seconds": []} for name in names}
    for _ in range(options.repeats):
        children = {
            name: subprocess.Popen(
                [sys.executable, str(BENCH), *shape, "--one", name], stdout=subprocess.PIPE, text=True
            )
            for name in names
        }
        for name, child in children.items():
            assert child.stdout is not None
            answer = child.stdout.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                raise SystemExit(f"{name}: the process ended with {child.returncode}")
            facts = json.loads(answer)
            methods[name]["resident_bytes"].append(usage.ru_maxrss * 1024)
            methods[name]["processor_seconds"].append(facts.pop("processor_seconds"))
            methods[name] |= facts
    for fact in methods.values():
        above = zip(fact["resident_bytes"], methods["forward only"]["resident_bytes"], strict=True)
        fact["mib_above_forward_only"] = [round((own - base) / 2**20, 1) for own, base in above]
        for other in ("plain", "sqrt(T)"):
            pairs = zip(fact["processor_seconds"], methods[other]["processor_seconds"], strict=True)
            fact[f"times_{other}"] = [round(own / theirs, 3) for own, theirs in pairs]
    return {
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "task": shape_of(options),
        "methods": methods,
    }


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "LSTMCell",
        "length": options.length,
        "batch": options.batch,
        "width": options.width,
        "repeats": options.repeats,
    }
