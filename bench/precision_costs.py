"""What bench/precision.py measures of a selector besides perplexity: its time, the quality of its estimates, the memory of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from precision_baselines import unhook
from scipy import stats

from millpond.precision.calibration import Choice
from millpond.precision.decoder import linears
from millpond.precision.estimators import choose_estimators
from millpond.precision.pairs import Pair
from millpond.precision.selection import select

__all__ = ["estimators", "overhead", "process_memory"]


def overhead(model: Any, choices: dict[str, Choice], ids: torch.Tensor, turns: int = 41) -> dict[str, Any]:
    """Processor time of a decoding step behind 31 tokens that decides for itself, against one with the same bit-widths fixed, turn by turn."""
    ids = ids[:1, :32]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def step() -> float:
        began = process_time()
        with torch.no_grad():
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        spent = process_time() - began
        cache.crop(-1)
        return spent

    known: dict[str, torch.Tensor] = {}
    unhook(model)
    model.precision_hooks = select(model, choices)
    for name, linear in linears(model):
        linear.choose = _Note(linear.choose, name, known)
    step()
    fixed = {}
    for name, _ in linears(model):
        bits = choices[name].high if name not in known or bool(known[name]) else choices[name].low
        fixed[name] = Choice(bits, bits)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for deciding in (turn % 2 == 0, turn % 2 == 1):  # which is first changes, so that neither gains by it
            unhook(model)
            model.precision_hooks = select(model, choices if deciding else fixed)
            step()  # what is built at the first decision is built
            times[deciding].append(step())
    shares = np.sort(np.array(times[True]) / np.array(times[False]) - 1)
    lowest, highest = (int(stats.binom.ppf(at, turns, 0.5)) for at in (0.025, 0.975))
    return {
        "step_ms": round(1e3 * float(np.median(times[True])), 2),
        "share": round(float(np.median(shares)), 4),
        "share_interval_95": [round(float(shares[at]), 4) for at in (lowest, highest)],
        "turns": turns,
    }


class _Note:
    """A selector that writes down what it decided."""

    def __init__(self, selector: Any, name: str, known: dict[str, torch.Tensor]) -> None:
        self.selector, self.name, self.known = selector, name, known

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.known[self.name] = self.selector(rows)
        return self.known[self.name]


def estimators(
    model: Any, choices: dict[str, Choice], shares: dict[str, float], samples: torch.Tensor
) -> dict[str, float]:
    """Held-out quality of the estimates: medians over linears of rank correlation and of relative error."""
    pairs = {name: Pair(choice.low, choice.high, 1 - shares[name]) for name, choice in choices.items()}
    _, fits = choose_estimators(model, pairs, samples)  # the same seed draws the same projections
    ranks, errors, lines = [], [], []
    for name, fit in fits.items():
        choice = choices[name]
        exact = torch.cat(fit.exact).double()
        line = choice.projection is None
        guess = torch.cat(fit.norm) * choice.slope + choice.intercept if line else torch.cat(fit.projected)
        order = [part.argsort().argsort().double() for part in (exact, guess.double())]
        ranks.append(float(torch.corrcoef(torch.stack(order))[0, 1]))
        errors.append(float(((guess - exact).abs() / exact).median()))
        lines.append(line)
    return {
        "rank_correlation": round(float(np.median(ranks)), 3),
        "rank_correlation_lowest_tenth": round(float(np.quantile(ranks, 0.1)), 3),
        "relative_error": round(float(np.median(errors)), 3),
        "share_of_linear_estimators": round(float(np.mean(lines)), 3),
        "linears_with_a_choice": len(ranks),
    }


def process_memory(folder: Path) -> dict[str, float]:
    """MiB that a process of its own has grown by once a model is loaded and has taken a step: all weights in float32, and as bit planes."""
    taken = {}
    for name, load in (
        ("float32", "smollm2()[0]"),
        ("all widths", f"precision.load({str(folder)!r})"),
        ("one width of 4", f"precision.load({str(folder)!r}, bits=4)"),
        ("one width of 3", f"precision.load({str(folder)!r}, bits=3)"),
    ):
        code = _CHILD.format(bench=str(Path(__file__).parent), load=load)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        taken[name] = float(done.stdout.split()[-1])
    return taken


# Resident memory, pages of mapped files included. A first small forward loads what torch loads lazily.
_CHILD = """
import ctypes, gc, sys
sys.path.insert(0, {bench!r})
import torch, transformers
from pathlib import Path
from precision_texts import smollm2
from millpond import precision

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024

tiny = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
transformers.LlamaForCausalLM(tiny)(torch.ones(1, 4, dtype=torch.long))
before = resident()
model = {load}
with torch.no_grad():
    model(torch.ones(1, 1, dtype=torch.long))
print(round(resident() - before, 1))
"""
