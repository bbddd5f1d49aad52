"""Does `millpond watch` grow with the video? Its process's memory over 30 s of 4K and over an hour of video, from outside.

    OMP_NUM_THREADS=1 python bench/decoding_memory.py --out bench/results/decoding_memory.json

Each film is H.264 with reordered pictures: two seconds of moving texture, encoded once, whose packets are repeated to the length.
The bench starts `python -m millpond watch FILE --model minnow` as a process of its own and reads its resident memory from /proc
five times a second, beside how far it has read into the file. Reported are the greatest readings of the second and the last
quarter of the film (by bytes of the file read), and of all. In 4K every frame is rendered and shown to the model; of the hour,
two a second, while all 90,000 are decoded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from millpond.eval.hardware import describe

RATE, PATTERN = 25, 50
FILMS = {  # width, height, seconds, frames taken a second
    "4K, 30 s, every frame": (3840, 2160, 30, 25),
    "an hour of 640x360, 2 frames a second": (640, 360, 3600, 2),
}
_POLL_SECONDS = 0.2


def write_film(path: Path, width: int, height: int, seconds: int) -> int:
    """A film of so many seconds; returns its frames."""
    ground = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    ground = ground.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "veryfast", "bf": "3", "g": str(PATTERN), "x264-params": "open-gop=0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for index in range(PATTERN):
            picture = av.VideoFrame.from_ndarray(np.roll(ground, 8 * index, axis=1), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, RATE)
            packets += stream.encode(picture)
        packets += stream.encode(None)
        # Muxing takes a packet's content away, so each is kept as bytes and made anew.
        kept = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        unit = packets[0].time_base
        rounds = seconds * RATE // PATTERN
        for turn in range(rounds):
            for content, pts, dts, key in kept:
                packet = av.Packet(content)
                shift = round(turn * PATTERN / RATE / unit)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, unit
                packet.is_keyframe, packet.stream = key, stream
                container.mux(packet)
    return rounds * PATTERN


def resident(pid: int) -> int:
    """Bytes; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def read_share(pid: int, path: Path) -> float:
    """How much of the file the process has read, by the position of its handle; 0 where it has none open."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if link.resolve() == path:
                lines = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().splitlines()
                return int(next(line.split()[1] for line in lines if line.startswith("pos:"))) / path.stat().st_size
    except OSError:
        pass
    return 0.0


def measure(path: Path, fps: int) -> dict[str, object]:
    """Watch a film in a process of its own; its readings."""
    words = [
        sys.executable,
        "-m",
        "millpond",
        "watch",
        str(path),
        "--model",
        "minnow",
        "--fps",
        str(fps),
        "--json",
        "-q",
    ]
    readings: list[tuple[float, int]] = []
    began = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            readings.append((read_share(child.pid, path), resident(child.pid)))
            time.sleep(_POLL_SECONDS)
        assert child.stdout is not None
        found = json.loads(child.stdout.read().splitlines()[-1])
    if child.returncode:
        raise SystemExit(f"watch failed: {found}")
    parts = {"second_quarter": (0.25, 0.5), "last_quarter": (0.75, 1.0)}
    most = {name: max(size for share, size in readings if low < share <= high) for name, (low, high) in parts.items()}
    return {
        "frames_taken": found["usage"]["frames_seen"],
        "stream_seconds": found["usage"]["stream_seconds"],
        "wall_seconds": round(time.monotonic() - began, 1),
        "readings": len(readings),
        "rss_bytes_most": {**most, "all": max(size for _, size in readings)},
        "growth_bytes": most["last_quarter"] - most["second_quarter"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout gets it too")
    arguments = parser.parse_args()
    films = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, seconds, fps) in FILMS.items():
            path = Path(folder).resolve() / "film.mp4"
            frames = write_film(path, width, height, seconds)
            films[name] = {"width": width, "height": height, "frames": frames, **measure(path, fps)}
    result = {
        "command": "OMP_NUM_THREADS=1 python bench/decoding_memory.py --out bench/results/decoding_memory.json",
        "aim": "flat: the last quarter takes no more than the second, but for what an allocator rounds up",
        "machine": describe(),
        "films": films,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
