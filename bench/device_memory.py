"""A session's device budget against the resident memory of a process of its own, and what it costs to keep it (Linux, glibc).

    OMP_NUM_THREADS=1 python bench/device_memory.py --out bench/results/device_memory.json

Minnow in nested bit planes watches frames within a few budgets. How far resident memory grows (at most, and at rest) is read from
outside, over the same process after a small session has come and gone; once as millpond does it, and once with the C heap left to
itself. Processor time is of the second half of the frames; the two ways take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from millpond.budget import parse_bytes
from millpond.machine import describe

BUDGETS = ("7MiB", "16MiB", "48MiB")

CHILD = """
import ctypes, gc, sys
from time import process_time
import numpy as np
import millpond.device
from millpond import Session
from millpond.frames import Frame

folder, memory, count, held = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "held"
if not held:
    millpond.device.hold_nothing = lambda: None

def run(memory, count):
    session = Session.from_pretrained(folder, device_memory=memory, frame_size=(64, 64))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    frames = [Frame(index / 2, pixels) for index in range(count)]
    session.feed(frames[: count // 2])
    began = process_time()
    session.feed(frames[count // 2 :])
    spent = process_time() - began
    session.ask("which object was in the top-left ?", max_new_tokens=4)
    return session, spent

def tell(*numbers):
    gc.collect()
    print(*numbers, flush=True)
    sys.stdin.readline()

run("7MiB", 64)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
tell(0)
session, spent = run(memory, count)
tell(1e3 * spent / (count - count // 2))
"""


def resident(folder: Path, memory: int, frames: int, way: str) -> dict[str, float]:
    """Growth of a process in bytes, at most and at rest, and milliseconds of processor time a frame."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(memory), str(frames), way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    system, seen, spent = Path(f"/proc/{child.pid}"), [], 0.0
    with child:
        for _ in range(2):
            spent = float(child.stdout.readline())
            status = dict(line.split(":", 1) for line in (system / "status").read_text().splitlines())
            seen.append([int(status[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")])
            (system / "clear_refs").write_text("5")  # the peak begins anew
            child.stdin.write("\n")
            child.stdin.flush()
    before, (rest, peak) = seen[0][0], seen[1]
    return {"peak": peak - before, "rest": rest - before, "ms": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "what": "growth of a process's resident memory with a session of a device budget, in bytes: least and most of the turns",
        "command": f"python bench/device_memory.py --frames {options.frames} --turns {options.turns}",
        "machine": describe(),
        "frames": options.frames,
        "turns": options.turns,
    }
    with tempfile.TemporaryDirectory() as place:
        folder, prose = Path(place) / "minnow", Path(place) / "prose.txt"
        prose.write_text("which object was in the top-left when did it appear first and last where what colour " * 20)
        words = [
            "quantize",
            "minnow",
            str(folder),
            "--calibration",
            str(prose),
            "--samples",
            "2",
            "--length",
            "32",
            "-q",
        ]
        subprocess.run([sys.executable, "-m", "millpond", *words], check=True)
        for budget in BUDGETS:
            seen: dict[str, list[dict[str, float]]] = {"held": [], "left": []}
            for turn in range(options.turns):
                for way in ("held", "left") if turn % 2 else ("left", "held"):
                    seen[way].append(resident(folder, parse_bytes(budget), options.frames, way))
            shares = [one["ms"] / other["ms"] - 1 for one, other in zip(seen["held"], seen["left"], strict=True)]
            result[budget] = {
                "bytes": parse_bytes(budget),
                **{
                    f"{what}_{way}": [min(one[what] for one in rows), max(one[what] for one in rows)]
                    for way, rows in seen.items()
                    for what in ("peak", "rest")
                },
                "ms_a_frame": round(statistics.median(one["ms"] for one in seen["held"]), 2),
                "share_of_time_for_it": [round(share, 3) for share in sorted(shares)],
            }
            print(budget, json.dumps(result[budget]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
