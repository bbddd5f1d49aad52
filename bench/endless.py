"""A stream that does not end: bytes, resident memory and time per frame at its start and at its end.

    OMP_NUM_THREADS=1 python bench/endless.py --out bench/results/endless.json

20,000 frames of 64 x 64 pixels, 2 a second (2.8 hours of stream time), through Minnow under a constant budget. Its trained range is
128 positions, so keys are re-anchored all the way. Frames are made as
they are needed. Time is the process's own processor time, which other jobs on the machine do not add to. RSS is read every 100 frames; its slope is a least-squares line over the second half.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import process_time

import numpy as np
import psutil
from machine import describe

from millpond import Session, families
from millpond.frames import Frame

EDGE = 64
WINDOW = 500


def frames(count: int) -> Iterator[Frame]:
    random = np.random.default_rng(0)
    ground = random.integers(0, 200, (EDGE, EDGE, 3), dtype=np.uint8)
    for index in range(count):
        pixels = ground.copy()
        at = index % (EDGE - 8)
        pixels[at : at + 8, :8] = index % 251
        yield Frame(index / 2, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--budget", default="1MiB")
    parser.add_argument("--policy", default="infinipot-v")
    options = parser.parse_args()
    family = families.load("minnow")
    session = Session(family, budget=options.budget, policy=options.policy)
    process = psutil.Process()
    spent: list[float] = []
    resident: list[tuple[int, int]] = []
    held: list[int] = []
    for index, frame in enumerate(frames(options.frames)):
        began = process_time()
        session.feed(frame)
        spent.append(process_time() - began)
        if index % 100 == 99:
            gc.collect()
            resident.append((index + 1, process.memory_info().rss))
            held.append(sum(t.untyped_storage().nbytes() for layer in session._pond.layers for t in layer.tensors()))
            print(f"\r{index + 1}/{options.frames}", end="", file=sys.stderr)
    print(file=sys.stderr)
    half = resident[len(resident) // 2 :]
    slope = float(np.polyfit([x for x, _ in half], [y for _, y in half], 1)[0])
    # A frame pair runs through the model when its second frame comes: windows of an even number of frames, as means.
    windows = [statistics.mean(spent[i : i + WINDOW]) * 1e3 for i in range(WINDOW, len(spent) - WINDOW + 1, WINDOW)]
    quarter = max(1, len(windows) // 4)
    start, end = statistics.median(windows[:quarter]), statistics.median(windows[-quarter:])
    usage = session.usage
    result = {
        "what": f"{options.frames} frames of {EDGE} x {EDGE} under {options.budget}, policy {options.policy}",
        "machine": describe(),
        "noise": "a shared machine with other jobs running",
        "aim": {"rss_slope_bytes_per_1000_frames": 0, "cpu_ms_per_frame_change": "within 5 %"},
        "rss_slope_bytes_per_1000_frames": round(slope * 1000),
        "rss_mib": {
            "after 10 %": round(resident[len(resident) // 10][1] / 2**20, 1),
            "end": round(resident[-1][1] / 2**20, 1),
        },
        "kv_bytes_allocated": {"least": min(held), "most": max(held)},
        "cpu_ms_per_frame": {
            "first quarter": round(start, 3),
            "last quarter": round(end, 3),
            "change": round(end / start - 1, 4),
            "windows": [round(window, 3) for window in windows],
        },
        "usage": usage.to_dict(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
