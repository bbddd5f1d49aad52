"""An endless stream: does anything grow? 20,000 frames through a tiny Qwen2.5-VL under a constant budget.

    OMP_NUM_THREADS=1 python bench/endless.py --out bench/results/endless.json

Frames of 56 x 56 (16 tokens a pair) at 2 frames a second; after every window of frames the session is asked a question, which
it forgets. At each window's end the bench reads the ledger and the process's resident memory: all of it (RSS), and the
anonymous part, which leaves out pages of libraries that the kernel drops and reads again as other jobs press. The bench keeps
its readings in an array that exists from the start, so that they are not what grows. After the first window, in the middle and
at the end it sums the storages of every tensor that is alive and not the model's (found by the garbage collector, so without
the session's help); not oftener, because such a walk lists every object of the process and leaves holes in its heap.

- slopes: median slope over the windows of the second half, in bytes per 1,000 frames.
- ms per frame: of a window, everything included (source, vision, decoder, compaction, re-anchoring), its question left out; wall
  clock and processor time. Start and end are medians over the first and the last windows; the very first window, in which the
  memory fills and the process warms up, is left out.
- paired: because a shared machine drifts over minutes, the old session is also compared with a new one, full to the same
  budget, that takes the same frames in turns with it (processor time).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import psutil
import torch
from models import qwen2_5_vl
from tqdm import tqdm

from millpond import Session
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.models import Family

FPS, EDGE = 2.0, 56
STAGES = ("source", "vision", "decoder", "compaction")
# Readings at the end of a window; times are ms per frame, without the question (answer_ms, ms in all).
TIMES = ("wall_ms", "cpu_ms", *(f"{stage}_ms" for stage in STAGES), "answer_ms")
BYTES = ("rss", "anonymous", "allocated", "live", "peak", "storage", "tensor")
COUNTS = ("frames", *(f"{name}_bytes" for name in BYTES), "memory_tokens", "compactions", "reanchorings")
READINGS = np.dtype([(name, np.int64) for name in COUNTS] + [(name, np.float64) for name in TIMES])
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 7,
    "out_hidden_size": 64,
    "window_size": 28,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}


def stream(first: int, count: int) -> Iterator[Frame]:
    """Frames `first` to `first + count`: a block wandering over a fixed ground, a new colour each frame."""
    ground = np.random.default_rng(0).integers(0, 80, (EDGE, EDGE, 3), dtype=np.uint8)
    for index in range(first, first + count):
        pixels = ground.copy()
        x, y = 7 * index % (EDGE - 12), 5 * index % (EDGE - 12)
        pixels[y : y + 12, x : x + 12] = (37 * index % 156 + 100, 59 * index % 156 + 100, 83 * index % 156 + 100)
        yield Frame(index / FPS, pixels)


def tensor_bytes(family: Family) -> int:
    """Bytes of all tensors alive in the process but the model's and the adapter's own, each storage once."""
    layouts = [tensor for layout in getattr(family, "_layouts", {}).values() for tensor in layout.values()]
    own = [*family.model.parameters(), *family.model.buffers(), *vars(family.rope).values(), *layouts]
    known = {tensor.untyped_storage().data_ptr() for tensor in own if isinstance(tensor, torch.Tensor)}
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def anonymous_bytes() -> int:
    """Resident memory that no file backs; -1 where there is no /proc."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return -1
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def take(session: Session, first: int, count: int) -> tuple[float, float]:
    """Feed frames; return wall and processor time in ms per frame."""
    wall, cpu = perf_counter(), process_time()
    session.feed(stream(first, count))
    return (perf_counter() - wall) * 1e3 / count, (process_time() - cpu) * 1e3 / count


def watch(session: Session, frames: int, size: int, before: int) -> np.ndarray:
    """Feed all frames in windows of `size`; one row of `READINGS` a window.

    `before`: bytes of tensors alive before the session was made.
    """
    process, spent = psutil.Process(), dict.fromkeys(STAGES, 0.0)
    windows = np.ones(frames // size, READINGS)  # ones, not zeros: the pages are touched now
    with tqdm(total=frames, unit="frame", mininterval=2) as bar:
        for window in windows:
            window["wall_ms"], window["cpu_ms"] = take(session, bar.n, size)
            usage = session.usage
            for stage in STAGES:
                now = getattr(usage, f"seconds_{stage}")
                window[f"{stage}_ms"] = (now - spent[stage]) * 1e3 / size
                spent[stage] = now
            began = perf_counter()
            session.ask("What is there?", max_new_tokens=8)
            window["answer_ms"] = (perf_counter() - began) * 1e3
            usage = session.usage
            for name in ("allocated_bytes", "live_bytes", "peak_bytes", "memory_tokens", "compactions", "reanchorings"):
                window[name] = getattr(usage, name)
            window["frames"] = usage.frames_seen
            window["storage_bytes"] = session.plan.slots * session.plan.bytes_per_token
            window["rss_bytes"] = process.memory_info().rss
            window["anonymous_bytes"] = anonymous_bytes()
            bar.update(size)
            walk = bar.n in (size, frames // size // 2 * size, frames)
            window["tensor_bytes"] = tensor_bytes(session.family) - before if walk else -1
    return windows


def compare(old: Session, new: Session, first: int, turns: int, count: int) -> dict[str, float]:
    """Processor time per frame of a long-lived session and a new one that take the same frames in turns."""
    times: dict[str, list[float]] = {"old": [], "new": []}
    for turn in range(turns):
        order = (("old", old), ("new", new)) if turn % 2 else (("new", new), ("old", old))
        for name, session in order:
            times[name].append(take(session, first + turn * count, count)[1])
    ratios = [one / other for one, other in zip(times["old"], times["new"], strict=True)]
    return {
        "turns": turns,
        "frames_a_turn": count,
        "old_cpu_ms": round(statistics.median(times["old"]), 4),
        "new_cpu_ms": round(statistics.median(times["new"]), 4),
        "old_over_new": round(statistics.median(ratios), 4),
        "old_over_new_of_totals": round(sum(times["old"]) / sum(times["new"]), 4),
    }


def slope(windows: np.ndarray, name: str) -> float:
    """Growth of a reading per 1,000 frames: the median slope between windows of the second half (Theil and Sen).

    Least squares would follow the single steps by which an allocator takes or gives back pages.
    """
    half = windows[len(windows) // 2 :]
    low, high = np.triu_indices(len(half), 1)
    rise = half[name][high].astype(np.float64) - half[name][low]
    return round(float(np.median(rise / (half["frames"][high] - half["frames"][low])) * 1000), 1)


def summary(windows: np.ndarray) -> dict[str, object]:
    rest = windows[1:]
    ends = max(1, len(rest) // 8)
    middle = (len(rest) - ends) // 2
    parts = {"start": rest[:ends], "middle": rest[middle : middle + ends], "end": rest[-ends:]}
    medians = {name: {part: round(float(np.median(rows[name])), 4) for part, rows in parts.items()} for name in TIMES}
    last = windows[-1]
    walked = windows["tensor_bytes"][windows["tensor_bytes"] >= 0]
    return {
        "rss_slope_bytes_per_1000_frames": slope(windows, "rss_bytes"),
        "anonymous_slope_bytes_per_1000_frames": slope(windows, "anonymous_bytes"),
        "rss_bytes": {part: int(np.median(rows["rss_bytes"])) for part, rows in parts.items()},
        "anonymous_bytes": {part: int(np.median(rows["anonymous_bytes"])) for part, rows in parts.items()},
        "windows_a_median": ends,
        "ms_per_frame": medians,
        "end_over_start": {
            name: round(medians[name]["end"] / medians[name]["start"], 4) for name in ("wall_ms", "cpu_ms")
        },
        "kv": {
            "live_bytes": int(last["live_bytes"]),
            "storage_bytes": int(last["storage_bytes"]),
            "peak_bytes": int(last["peak_bytes"]),
            "tensor_bytes_least": int(walked.min()),
            "tensor_bytes_most": int(walked.max()),
        },
        "compactions": int(last["compactions"]),
        "reanchorings": int(last["reanchorings"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout gets the summary")
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument(
        "--window", type=int, default=500, help="frames a window; a multiple of 2 that divides --frames"
    )
    parser.add_argument("--budget", default="512KiB")
    parser.add_argument("--limit", type=int, default=4096, help="the model's max_position_embeddings")
    options = parser.parse_args()
    if options.window < 2 or options.window % 2 or options.frames % options.window:
        parser.error("--window must be a multiple of 2 that divides --frames")
    if options.frames < 4 * options.window:
        parser.error("--frames must be at least four windows: the first is a warm-up and the slope needs a half")

    family = qwen2_5_vl({**TEXT, "max_position_embeddings": options.limit}, VISION)
    before = tensor_bytes(family)
    session = Session(family, budget=options.budget)
    began = perf_counter()
    windows = watch(session, options.frames, options.window, before)
    seconds = perf_counter() - began
    new = Session(family, budget=options.budget)
    take(new, 0, options.window)
    paired = compare(session, new, options.frames, 20, max(2, options.window // 5 * 2))

    result = {
        "what": "a tiny random Qwen2.5-VL (3 layers, 2 KV heads x 16, float32) watches an endless stream of 56 x 56 frames",
        "command": "OMP_NUM_THREADS=1 python bench/endless.py --out bench/results/endless.json",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; processor times, and above all the paired ratio, are steadier than ms",
        "aim": {"rss_slope_bytes_per_1000_frames": 0, "end_over_start": "within 5 %"},
        "frames": options.frames,
        "window": options.window,
        "policy": session.policy.name,
        "positions": session.positions,
        "position_limit": options.limit,
        "budget_bytes": session.plan.budget,
        "plan": session.plan.to_dict(),
        "seconds": round(seconds, 1),
        "summary": {**summary(windows), "paired": paired},
    }
    print(json.dumps(result["summary"], indent=2))
    table = [dict(zip(READINGS.names, row.tolist(), strict=True)) for row in windows]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**result, "windows": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
