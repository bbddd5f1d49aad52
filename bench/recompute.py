"""Time and peak memory of backpropagation through time: plain, checkpointed every sqrt(T) steps, and planned.

    python bench/recompute.py --out bench/results/recompute.json
    python bench/recompute.py --sections processes --batch 64 --width 512 --repeats 2

One LSTM, one sequence, a loss at every step. Sections that are not run stay in the file as they are.

comparison: all methods run in one process, in a new order in every repetition, and are compared with the plain run of
the same repetition, in wall time and in processor time, because the machine may be shared. Peak memory comes from
separate runs in which every tensor that appears is weighed and followed by a weak reference; tensors shaped like a
parameter (gradients) are left out, for all methods alike.

processes: every run is a process of its own, and its memory is the kernel's high-water mark of that process, less that
of a process which runs the sequence forward without a graph.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from recompute_comparison import compare
from recompute_measuring import machine
from recompute_methods import Task
from recompute_planning import planning, theory
from recompute_processes import one_process, processes, shape_of
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["theory", "planning", "comparison", "processes"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=384, help="inputs and hidden units of the LSTM")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the method that a child process runs
    parser.add_argument("--out", type=Path, default=Path("bench/results/recompute.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if "processes" in options.sections and not options.one:  # while this process is small: a child starts at its size
        result["processes"] = processes(options)
        print_processes(result["processes"])
    cell = nn.LSTMCell(options.width, options.width)
    state = (torch.zeros(options.batch, options.width), torch.zeros(options.batch, options.width))
    task = Task(cell, torch.randn(options.length, options.batch, options.width), state)
    if options.one:
        print(json.dumps(one_process(task, options.one)))
        return
    if "theory" in options.sections:
        result["theory"] = theory()
    if "planning" in options.sections:
        result["planning"] = {**planning(), "date": datetime.date.today().isoformat()}
    if "comparison" in options.sections:
        result |= {"machine": machine(), "task": shape_of(options), "comparison": compare(task, options.repeats)}
        print_comparison(result["comparison"])
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def print_processes(section: dict[str, Any]) -> None:
    for name, fact in section["methods"].items():
        print(
            f"{name:14} MiB above forward only: {fact['mib_above_forward_only']}  processor time / plain: "
            f"{fact['times_plain']} / sqrt(T): {fact['times_sqrt(T)']}"
        )


def print_comparison(section: dict[str, Any]) -> None:
    for label, fact in section["methods"].items():
        print(
            f"{label:34} {fact['peak_bytes'] / 2**20:8.2f} MiB  {fact['forwards_per_step']:6.3f} forwards a step  "
            + "  ".join(
                f"{clock}: {fact[clock]['times_plain']:5.2f} x plain {fact[clock]['times_sqrt']:5.2f} x sqrt(T) "
                f"{fact[clock]['times_predicted']:5.3f} x predicted"
                for clock in ("processor", "wall")
            )
        )


if __name__ == "__main__":
    main()
