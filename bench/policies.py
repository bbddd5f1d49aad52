"""Selection and compaction of every policy at Qwen2-VL-7B's shapes, in one run, beside a copy of the same bytes.

    OMP_NUM_THREADS=1 python bench/policies.py --out bench/results/policies.json

A pass keeps 4,536 of 6,048 tokens in each of 28 layers x 4 KV heads x 128, as in bench/compaction.py, whose pond this uses.
Policies that move what leaves to another tier (mikv, rekv) have another kind of pass and are left out. Policies take turns, so that another job on the machine slows all alike; figures are medians. What a policy costs beside its pass
is not in them: the forward of a proxy text, and H2O's sums during ingest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from compaction import KEPT, LAYERS, TOKENS, fill, new_pond, peak_bytes
from tqdm import tqdm

from millpond import ops, policies
from millpond.cache import Pond
from millpond.eval.hardware import describe
from millpond.policies.base import Policy


def copy_all(pond: Pond) -> None:
    """Read and write every key and value once."""
    for index, layer in enumerate(pond.layers):
        other = pond.layers[(index + LAYERS // 2) % LAYERS]
        other.keys.copy_(layer.keys)
        other.values.copy_(layer.values)


def _needs(policy: Policy) -> tuple[object, ...]:
    return policy.needs.accumulated_attention, policy.needs.proxy, policy.needs.queries


def measure(names: list[str], dtype: torch.dtype, repetitions: int) -> dict[str, object]:
    made: dict[str, Policy] = {name: policies.get(name) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in ["copy", *names]}
    pond = new_pond(dtype, policies.get("recent"))

    def pond_of(policy: Policy) -> Pond:
        """The pond, made anew where the policy needs other storage beside the keys."""
        nonlocal pond
        if _needs(policy) != _needs(pond.policy):
            pond = new_pond(dtype, policy)
        pond.policy = policy
        fill(pond)
        return pond

    for _ in tqdm(range(repetitions), desc=str(dtype), file=sys.stderr):
        for name, times in spent.items():
            if name in made:
                run = partial(pond_of(made[name]).compact, KEPT)
            else:
                run = partial(copy_all, pond_of(pond.policy))
            began = perf_counter()
            run()
            times.append(perf_counter() - began)
    copy = statistics.median(spent.pop("copy"))
    rows = {}
    for name, times in spent.items():
        peak = peak_bytes(partial(pond_of(made[name]).compact, KEPT))
        pass_seconds = statistics.median(times)
        rows[name] = {
            "milliseconds_a_pass": round(pass_seconds * 1e3, 1),
            "pass_over_copy": round(pass_seconds / copy, 2),
            "scratch_bytes": peak,
            "scratch_share_of_cache": round(peak / pond.storage.nbytes, 5),
        }
    return {"copy_milliseconds": round(copy * 1e3, 1), "policies": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--policies", nargs="+", help="by default every capped one without another tier")
    options = parser.parse_args()
    torch.manual_seed(0)
    kept = [policies.get(kind.name) for kind in policies.available() if kind.capped]
    names = options.policies or [
        policy.name for policy in kept if not policy.needs.quantized_tier and not policy.needs.retrieved_frames
    ]
    kinds = {
        str(dtype).split(".")[1]: measure(names, dtype, options.repetitions)
        for dtype in (torch.float32, torch.bfloat16)
    }
    result = {
        "what": f"one compaction pass at Qwen2-VL-7B's shapes, {TOKENS} -> {KEPT} tokens, every policy in one run",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; compare the ratios, not the milliseconds",
        "kernels": "compiled" if ops.status().endswith(".so") else ops.status(),
        **kinds,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
