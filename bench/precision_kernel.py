"""One decoding step's product from bit planes against the float32 matmul of the same layer, one processor, one vector.

    OMP_NUM_THREADS=1 python bench/precision_kernel.py --out bench/results/precision_kernel.json

Planes and tables are random: the time does not depend on what they hold. In a model every step reads all layers once, so a matrix is cold
when its turn comes. Each product therefore walks over as many copies of its layer as make --pool of float32 weights, for both sides
the same number. The two take turns and are timed by processor time, which a busy machine disturbs less than it does wall time; a ratio is the
median of the ratios of the turns. Six planes are kept, the most that calibration keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from tqdm import tqdm

from millpond.eval.hardware import describe
from millpond.memory.budget import parse_bytes
from millpond.ops import status
from millpond.precision.nested import NestedWeight, product

BIT_WIDTHS = (3, 4, 5, 6)
PLANES = max(BIT_WIDTHS)
# Rows N and columns K of the linears of a decoder layer; those of one shape are listed once.
LAYERS = {
    "SmolLM2-135M": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    "Llama-2-7B": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
}
# The largest relative error of any product here; the format's tests hold it to the same.
TOLERANCE = 1e-5


def random_weight(rows: int, columns: int, rng: torch.Generator) -> NestedWeight:
    """Planes of random labels and ascending random tables."""
    planes = torch.randint(0, 256, (rows, PLANES, -(-columns // 8)), dtype=torch.uint8, generator=rng)
    tables = {bits: torch.randn(rows, 1 << bits, generator=rng).sort(dim=1).values.half() for bits in BIT_WIDTHS}
    return NestedWeight(planes, tables, columns)


def processor_seconds(run: Callable[[], None]) -> float:
    began = process_time()
    run()
    return process_time() - began


@torch.no_grad()
def measure(rows: int, columns: int, pool: int, turns: int) -> dict[str, Any]:
    """Microseconds of a product, and ratios to the float32 one, by bit-width.

    Raises:
        ArithmeticError: a product is not that of the dense matrix; a time for it would mean nothing.
    """
    rng = torch.Generator().manual_seed(0)
    copies = max(2, -(-pool // (4 * rows * columns)))
    floats = [torch.randn(rows, columns, generator=rng) for _ in range(copies)]
    weights = [random_weight(rows, columns, rng) for _ in range(copies)]
    x = torch.randn(1, columns, generator=rng)
    for bits in BIT_WIDTHS:
        want = x.double() @ weights[0].dense(bits).double().T
        error = float((product(weights[0], bits, x) - want).norm() / want.norm())
        if error > TOLERANCE:
            raise ArithmeticError(f"{rows} x {columns} at {bits} bits is wrong by {error:.1e}")

    def float_pass() -> None:
        for weight in floats:
            torch.nn.functional.linear(x, weight)

    def nested_pass(bits: int) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                product(weight, bits, x)

        return run

    passes = {bits: nested_pass(bits) for bits in BIT_WIDTHS}
    times: dict[int, list[float]] = {bits: [] for bits in BIT_WIDTHS}
    floats_times, ratios = [], {bits: [] for bits in BIT_WIDTHS}
    for turn in range(turns + 1):
        for bits, run in passes.items():
            plain, ours = processor_seconds(float_pass), processor_seconds(run)
            if turn:  # the first turn warms both up
                floats_times.append(plain)
                times[bits].append(ours)
                ratios[bits].append(ours / plain)
    return {
        "rows": rows,
        "columns": columns,
        "copies": copies,
        "float32_us": _microseconds(floats_times, copies),
        "packed_us": {str(bits): _microseconds(found, copies) for bits, found in times.items()},
        "packed_to_float32": {str(bits): round(statistics.median(found), 3) for bits, found in ratios.items()},
    }


def _microseconds(seconds: list[float], copies: int) -> float:
    return round(statistics.median(seconds) / copies * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pool", type=parse_bytes, default="512MiB", help="float32 weights that a pass walks over")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(model, name, shape) for model in options.models for name, shape in LAYERS[model].items()]
    layers: dict[str, dict[str, Any]] = {}
    for model, name, shape in tqdm(shapes, unit="layer"):
        layers.setdefault(model, {})[name] = measure(*shape, options.pool, options.turns)
    ratios = [row["packed_to_float32"]["4"] for rows in layers.values() for row in rows.values()]
    result = {
        "what": "one vector times one layer from packed planes, against torch's float32 linear; processor time",
        "machine": describe(),
        "kernels": "compiled" if status().endswith(".so") else f"none: {status()}",
        "planes_kept": PLANES,
        "pool_bytes": options.pool,
        "turns": options.turns,
        "aim": "at 4 bits not slower than float32: every ratio at most 1",
        "aim_met": max(ratios) <= 1,
        "worst_ratio_at_4_bits": max(ratios),
        "layers": layers,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
