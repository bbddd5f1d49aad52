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
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from millpond import recompute
from millpond.recompute.closed_form import hidden_forwards, internal_forwards
from millpond.recompute.table import build_table, mixed_table

BACKWARD_FORWARDS = 2  # what the paper takes a backward to cost


@dataclass(frozen=True)
class Task:
    """One LSTM cell and one sequence; `loss(h)` is taken at every step."""

    cell: nn.LSTMCell
    inputs: Tensor
    state: tuple[Tensor, Tensor]

    @property
    def length(self) -> int:
        return len(self.inputs)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = self.cell(x, state)
        return state[0].square().mean(), state


class Peak(TorchDispatchMode):
    """Bytes of live tensors made inside, at their peak; those shaped like a parameter are left out."""

    def __init__(self, left_out: set[torch.Size]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._left_out = left_out
        self._followed: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape not in self._left_out:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in given and storage not in self._followed:
                    self._followed.add(storage)
                    weakref.finalize(storage, self._gone, storage.nbytes())
                    self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, nbytes: int) -> None:
        self.live -= nbytes


def run_plain(task: Task) -> None:
    state, total = task.state, torch.zeros(())
    for x in task.inputs:
        loss, state = task.step(x, state)
        total = total + loss
    total.backward()


def run_sqrt(task: Task) -> None:
    """Chen et al.: the states every sqrt(T) steps; the last stretch is kept, as it is needed first."""
    size = round(math.sqrt(task.length))

    def stretch(xs: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        total, now = torch.zeros(()), state
        for x in xs:
            loss, now = task.step(x, now)
            total = total + loss
        return (total, *now)

    state, total = task.state, torch.zeros(())
    for start in range(0, task.length, size):
        xs = task.inputs[start : start + size]
        if start + size < task.length:
            loss, *state = checkpoint(stretch, xs, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, *state = stretch(xs, *state)
        total = total + loss
    total.backward()


def run_planned(task: Task, budget: int, strategy: str) -> None:
    total, _ = recompute.bptt(task.step, task.inputs, task.state, budget=budget, strategy=strategy, loss=first)
    total.backward()


def first(output: Tensor, t: int) -> Tensor:
    """The step's output is its loss already."""
    return output


def run_schedule(task: Task, actions: list[Any]) -> None:
    """A plain executor for the schedules of the checkpoint_schedules package."""
    from checkpoint_schedules import Copy, Forward, Move, Reverse, StorageType

    states: dict[int, tuple[Tensor, Tensor]] = {}
    graphs: dict[int, tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]] = {}
    now, carry = task.state, [torch.zeros_like(part) for part in task.state]
    parameters = list(task.cell.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for action in actions:
        if isinstance(action, Forward):
            if action.write_ics:
                states[action.n0] = now
            for n in range(action.n0, action.n1):
                if action.write_adj_deps:
                    start = tuple(part.detach().requires_grad_() for part in now)
                    loss, end = task.step(task.inputs[n], start)
                    graphs[n] = (start, loss, end)
                    now = tuple(part.detach() for part in end)
                else:
                    with torch.no_grad():
                        _, now = task.step(task.inputs[n], now)
        elif isinstance(action, (Copy, Move)):
            if action.n in states:
                now = states[action.n]
                if isinstance(action, Move):
                    del states[action.n]
            else:
                # An internal state comes from storage to work: nothing to do, its graph is backpropagated next.
                assert action.to_storage == StorageType.WORK
        elif isinstance(action, Reverse):
            for n in reversed(range(action.n0, action.n1)):
                start, loss, end = graphs.pop(n)
                grads = torch.autograd.grad([loss, *end], [*start, *parameters], [torch.ones(()), *carry])
                carry = list(grads[:2])
                for held, grad in zip(sums, grads[2:], strict=True):
                    held.add_(grad)
                del start, loss, end
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad


@dataclass(frozen=True)
class Seconds:
    """Wall time, which other work on the machine stretches, and the processor's time on this process."""

    wall: float
    processor: float


def timed(run: Callable[[], None], cell: nn.Module) -> Seconds:
    cell.zero_grad(set_to_none=True)
    return stopwatch(run)


def stopwatch(run: Callable[[], None]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def run_forward(task: Task) -> None:
    """All steps once, without a graph."""
    with torch.no_grad():
        state = task.state
        for x in task.inputs:
            _, state = task.step(x, state)


def peak_bytes(run: Callable[[], None], cell: nn.Module) -> int:
    cell.zero_grad(set_to_none=True)
    with Peak({parameter.shape for parameter in cell.parameters()}) as peak:
        run()
    return peak.peak


def package_schedules(task: Task, size: recompute.StepSize, full: int) -> dict[str, dict[str, Any]]:
    """Schedules of the package for a budget; it counts the initial state among its snapshots, we do not."""
    from checkpoint_schedules import MixedCheckpointSchedule, Revolve, StorageType

    made = {}
    cases = [
        ("checkpoint_schedules Revolve, 1%", 0.01, size.hidden_bytes, lambda n: Revolve(task.length, n)),
        # Its mixed schedule takes both kinds of state to be of one size, so a unit has to hold the larger.
        (
            "checkpoint_schedules Mixed, 2%",
            0.02,
            size.internal_bytes,
            lambda n: MixedCheckpointSchedule(task.length, n, storage=StorageType.RAM),
        ),
    ]
    for name, share, unit, schedule in cases:
        snapshots = (int(share * full) - size.internal_bytes) // unit + 1
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actions = list(schedule(snapshots))
        seconds = time.perf_counter() - start
        forwards = sum(action.n1 - action.n0 for action in actions if type(action).__name__ == "Forward")
        made[name] = {"actions": actions, "share": share, "forwards": forwards, "planning_seconds": round(seconds, 3)}
    return made


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
            name: subprocess.Popen([sys.executable, __file__, *shape, "--one", name], stdout=subprocess.PIPE, text=True)
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


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "LSTMCell",
        "length": options.length,
        "batch": options.batch,
        "width": options.width,
        "repeats": options.repeats,
    }


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
