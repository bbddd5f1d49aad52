"""One compaction pass at Qwen2-VL-7B's shapes, against a plain copy and a straightforward reading of the released rule.

    OMP_NUM_THREADS=1 python bench/compaction.py --out bench/results/compaction.json
    OMP_NUM_THREADS=1 MILLPOND_NATIVE=0 python bench/compaction.py --out bench/results/compaction-torch.json

The memory holds 28 layers x 4 KV heads x 6,048 tokens x 128 (42 frames of 144 tokens, 12 x 12) and keeps 4,536 (31.5 frames).
`pass` is the pond's own compaction: selection, the check of the selection, and moving keys, values and metadata in place,
layer by layer; `copy` copies the keys and values of every layer into the storage of the layer half the model away, so that it
reads and writes cold memory as the pass does; `released` broadcasts r x f products of width D, takes the top tokens and
concatenates new tensors, layer by layer. "many frames" is a later pass: the tokens behind the recent frames lie scattered over
2,000 frames, differently in each head. All run interleaved in one process; ratios are of medians, the fastest are given beside them.
Scratch is what torch's allocator reports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from millpond import ops, policies
from millpond.cache import Pond
from millpond.cache.consumers import make_plan
from millpond.eval.hardware import describe
from millpond.memory.geometry import Geometry
from millpond.policies.base import Policy

LAYERS, HEADS, GROUP, WIDTH = 28, 4, 7, 128
ROWS = COLS = 12
FRAME = ROWS * COLS
FRAMES, KEPT = 42, 4_536
TOKENS = FRAMES * FRAME
CHUNK = 512
PROXY = 14  # tokens of a chat template behind the video


def fill(pond: Pond) -> None:
    """Fresh random tokens on full grids, as in a first pass."""
    grid = torch.stack(torch.meshgrid(torch.arange(ROWS), torch.arange(COLS), indexing="ij"), -1).view(-1, 2)
    times = (torch.arange(FRAMES) * 500_000).repeat_interleave(FRAME)
    grid_positions = grid.repeat(FRAMES, 1).to(torch.int16)
    pond.truncate(0)
    pond.write_metadata(times, grid_positions, times.expand(3, -1))
    pond.commit(times, grid_positions)
    for layer in pond.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.length = TOKENS
        if layer.sums is not None:
            layer.sums.uniform_()
    pond.queries.rows.normal_()
    pond.queries.counts = [pond.plan.query_bytes // pond.geometry.query_bytes] * LAYERS


def scatter(pond: Pond) -> None:
    """As after many passes: the tokens behind the recent frames are survivors of 2,000 earlier ones, others in each head."""
    past = TOKENS - int(FRAMES * 0.25) * FRAME
    for head in range(HEADS):
        cell = torch.randperm(2_000 * FRAME)[:past].sort().values
        at = cell % FRAME
        for layer in pond.layers:
            layer.time_us[head, :past] = (cell // FRAME - 2_000) * 500_000
            layer.grid_position[head, :past, 0] = at // COLS
            layer.grid_position[head, :past, 1] = at % COLS


def new_pond(dtype: torch.dtype, policy: Policy) -> Pond:
    geometry = Geometry(LAYERS, HEADS, WIDTH, dtype, axes=3, kv_groups=GROUP)
    budget = TOKENS * geometry.bytes_per_token * 11 // 10
    plan = make_plan(
        budget, geometry, policy, prompt_tokens=0, group_tokens=FRAME, reserve_tokens=0, proxy_tokens=PROXY
    )
    return Pond(geometry, replace(plan.with_slots(TOKENS), chunk=CHUNK), policy, torch.device("cpu"))


def released_pass(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the released rule says, written down directly: [1, H, n, D] -> new tensors of [1, H, KEPT, D]."""
    recent = int(FRAMES * 0.25)
    by_value = round(0.5 * KEPT)
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-9)
    latest = unit[:, :, -recent * FRAME :].reshape(1, HEADS, recent, 1, FRAME, WIDTH)
    past = unit[:, :, : -recent * FRAME].reshape(1, HEADS, 1, -1, FRAME, WIDTH)
    scores = -(latest * past).sum(-1).mean(2).reshape(HEADS, -1)
    chosen = scores.topk(KEPT - by_value - recent * FRAME, dim=-1).indices
    tail = torch.arange(TOKENS - recent * FRAME, TOKENS).expand(HEADS, -1)
    norms = values.norm(dim=-1)[0]
    norms.scatter_(1, torch.cat([chosen, tail], 1), float(norms.max()) + 1)
    keep = norms.topk(KEPT, dim=-1).indices.sort(dim=-1).values[None, :, :, None].expand(-1, -1, -1, WIDTH)
    empty = keys[:, :, :0]
    return torch.cat([empty, keys.gather(2, keep)], 2), torch.cat([empty, values.gather(2, keep)], 2)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's allocator held beyond the start, by its own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def measure(dtype: torch.dtype, repetitions: int) -> dict[str, object]:
    named = {
        "infinipot-v": policies.get("infinipot-v"),
        "infinipot-v, many frames": policies.get("infinipot-v"),
        "infinipot-v, no pooling": policies.get("infinipot-v", pooling=1),
        "recent": policies.get("recent"),
    }
    pond = new_pond(dtype, named["infinipot-v"])
    times: dict[str, list[float]] = {name: [] for name in [*named, "copy", "released"]}

    def copy_all() -> None:
        for index, layer in enumerate(pond.layers):
            other = pond.layers[(index + LAYERS // 2) % LAYERS]
            other.keys.copy_(layer.keys)
            other.values.copy_(layer.values)

    def release_all() -> None:
        for layer in pond.layers:
            released_pass(layer.keys, layer.values)

    for turn in range(repetitions):
        for name in times:
            fill(pond)
            if name.endswith("many frames"):
                scatter(pond)
            pond.policy = named.get(name, pond.policy)
            run = {"copy": copy_all, "released": release_all}.get(name, partial(pond.compact, KEPT))
            began = perf_counter()
            run()
            times[name].append(perf_counter() - began)
        print(f"\r{dtype} {turn + 1}/{repetitions}", end="", file=sys.stderr)
    print(file=sys.stderr)
    milliseconds = {name: statistics.median(spent) * 1e3 for name, spent in times.items()}
    scratch = {}
    for name, policy in named.items():
        fill(pond)
        if name.endswith("many frames"):
            scatter(pond)
        pond.policy = policy
        scratch[name] = peak_bytes(partial(pond.compact, KEPT))
    fill(pond)
    layer = pond.layers[0]
    scratch["released"] = peak_bytes(lambda: released_pass(layer.keys, layer.values))
    ours = milliseconds["infinipot-v"]
    return {
        "milliseconds_a_pass": {name: round(spent, 1) for name, spent in milliseconds.items()},
        "fastest_milliseconds_a_pass": {name: round(min(spent) * 1e3, 1) for name, spent in times.items()},
        "milliseconds_a_layer": {name: round(spent / LAYERS, 3) for name, spent in milliseconds.items()},
        "pass_over_copy": round(ours / milliseconds["copy"], 2),
        "released_over_pass": round(milliseconds["released"] / ours, 1),
        "scratch_bytes": scratch,
        "scratch_share_of_cache": {name: round(size / pond.storage.nbytes, 5) for name, size in scratch.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "what": "one compaction pass at Qwen2-VL-7B's shapes, 6,048 -> 4,536 tokens",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; compare the ratios, not the milliseconds",
        "kernels": "compiled" if ops.status().endswith(".so") else ops.status(),
        "aim": {"released_over_pass": ">= 20", "pass_over_copy": "<= 2", "scratch_share_of_cache": "<= 0.05"},
        **{str(dtype).split(".")[1]: measure(dtype, options.repetitions) for dtype in (torch.float32, torch.bfloat16)},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
