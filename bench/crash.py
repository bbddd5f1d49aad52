"""Kill -9 at random instants while a session is fed and saved: does every acknowledged snapshot load, and is none half?

    OMP_NUM_THREADS=1 python bench/crash.py --out bench/results/crash.json

Each round forks a process that loads the snapshot (begins a session in the first round), and then feeds frames of 56 x 56 to a tiny Qwen2.5-VL
and saves, over and over, until it is killed after a random time. It notes every save that has returned in a pipe, and in shared memory what it
is doing, so that it is known what the kill fell into. Then this process loads the file and holds it to a session of its own that was never
interrupted and has taken the same number of frames:

- whole: the file loads; nothing less counts.
- acknowledged: it holds at least as many frames as the last save that had returned.
- equal: everything that the session goes on with is, bit for bit, that of the one never interrupted, over all kills so far.
- clean: beside it lies at most the temporary file of the last writer that was killed; after one more save, none.

A process that dies takes none of what the kernel has been given with it, so these rounds do not show that fsync is called when it must be;
tests/snapshot/test_saving.py does. Rounds that a stored file already has are not run again: an interrupted bench goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endless import EDGE, FPS, TEXT, VISION
from models import qwen2_5_vl
from tqdm import tqdm

from millpond import Session
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.models import Family
from millpond.snapshot.state import values_of

ARGUMENTS: dict[str, Any] = {
    "budget": "256KiB",
    "policy": "infinipot-v",
    "admission": "curvestream",
    "recent_frames": 2,
}
PHASES = ("loading", "feeding", "saving")
# From the start of a round; loading takes about 20 ms of it, a frame 5, a save 15.
LONGEST_SECONDS = 0.4
STORE_EVERY = 25
MOST_FRAMES = 400


def frame(index: int) -> Frame:
    """Frame `index` of the stream: a block of noise wandering over a fixed ground."""
    random_ = np.random.default_rng(index)
    pixels = np.full((EDGE, EDGE, 3), 40, np.uint8)
    x, y = 7 * index % (EDGE - 16), 5 * index % (EDGE - 16)
    pixels[y : y + 16, x : x + 16] = random_.integers(100, 255, (16, 16, 3), dtype=np.uint8)
    return Frame(index / FPS, pixels)


def digest(session: Session) -> str:
    """Everything that a session goes on with, in one number; without wall time and the most that it ever held."""
    values, tensors = values_of(session._runner, session._ingest)
    del values["seconds"], values["peak_bytes"]
    found = hashlib.sha256(json.dumps(values).encode())
    for name in sorted(tensors):
        found.update(torch.as_tensor(tensors[name]).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def work(family: Family, path: Path, phase: mmap.mmap, acknowledged: int, frames: int) -> None:
    """What is killed: feed a frame, save, note it; up to so many `frames` of the stream, and then wait for the kill."""
    session = Session.load(path, family) if path.exists() else Session(family, **ARGUMENTS)
    phase[0] = 1

    def saving(frames: Iterator[Frame]) -> Iterator[Frame]:
        for one in frames:
            yield one
            phase[0] = 2
            session.save(path)
            os.write(acknowledged, session.usage.frames_seen.to_bytes(4, "little"))
            phase[0] = 1

    session.feed(saving(map(frame, range(session.usage.frames_seen, frames))))
    signal.pause()


def uninterrupted(family: Family, frames: int) -> list[str]:
    """The digest of a session behind each of its frames, in one feed, as the killed processes add up to."""
    session, found = Session(family, **ARGUMENTS), []

    def noting() -> Iterator[Frame]:
        for index in range(frames):
            yield frame(index)
            found.append(digest(session))

    session.feed(noting())
    return found


@dataclass
class Crashes:
    """The rounds so far.

    Attributes:
        rounds: killed processes. saves: those that returned. phases: what the kills fell into.
        beside: rounds that left a temporary file. faults: what was wrong, in words; must stay empty.
        begun: streams that were begun anew.
    """

    rounds: int = 0
    saves: int = 0
    begun: int = 0
    beside: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Bench:
    """Runs rounds in a folder of its own.

    Args:
        family: the model. folder: where the snapshot lies. seed: of the instants. frames: of a stream; one that comes near is begun anew, so
            that the last rounds cost no more than the first.
    """

    def __init__(self, family: Family, folder: Path, seed: int, frames: int) -> None:
        self.family, self.path = family, folder / "session.snapshot"
        self.random = random.Random(seed)
        self.phase = mmap.mmap(-1, 1)  # shared with the forked processes
        self.expected = uninterrupted(family, frames)
        self.least = 0

    def round(self, crashes: Crashes) -> None:
        """Fork, kill, load, compare."""
        readable, writable = os.pipe()
        self.phase[0] = 0
        child = os.fork()
        if child == 0:
            try:
                os.close(readable)
                work(self.family, self.path, self.phase, writable, len(self.expected))
            finally:
                os._exit(1)
        os.close(writable)
        time.sleep(self.random.uniform(0.0, LONGEST_SECONDS))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(readable, "rb") as pipe:
            noted = pipe.read()
        crashes.rounds += 1
        crashes.saves += len(noted) // 4
        crashes.phases[PHASES[self.phase[0]]] += 1
        if not os.WIFSIGNALED(status):
            crashes.faults.append(f"round {crashes.rounds}: the process ended by itself")
        if noted:
            self.least = int.from_bytes(noted[-4:], "little")
        self._check(crashes)

    def _check(self, crashes: Crashes) -> None:
        beside = len(os.listdir(self.path.parent)) - self.path.exists()
        crashes.beside += beside > 0
        if beside > 1:
            crashes.faults.append(f"round {crashes.rounds}: {beside} temporary files lie beside it")
        if not self.path.exists():
            if self.least:
                crashes.faults.append(f"round {crashes.rounds}: an acknowledged snapshot is gone")
            return
        try:
            session = Session.load(self.path, self.family)
        except Exception as error:
            crashes.faults.append(f"round {crashes.rounds}: {error}")
            return
        frames = session.usage.frames_seen
        if frames < self.least:
            crashes.faults.append(f"round {crashes.rounds}: {frames} frames, {self.least} were acknowledged")
        self.least = frames
        if digest(session) != self.expected[frames - 1]:
            crashes.faults.append(f"round {crashes.rounds}: {frames} frames, and another memory than without the kills")
        if frames > len(self.expected) * 3 // 4:
            self._clean(session, crashes)
            self.path.unlink()
            self.least = 0
            crashes.begun += 1

    def _clean(self, session: Session, crashes: Crashes) -> None:
        """One more save leaves the snapshot alone in its folder."""
        session.save(self.path)
        if os.listdir(self.path.parent) != [self.path.name]:
            crashes.faults.append(f"round {crashes.rounds}: temporary files are left")

    def finish(self, crashes: Crashes) -> None:
        """The last save."""
        if self.path.exists():
            self._clean(Session.load(self.path, self.family), crashes)


def run(
    rounds: int, seed: int, family: Family | None = None, out: Path | None = None, frames: int = MOST_FRAMES
) -> Crashes:
    """Run rounds up to `rounds`, those that are stored in `out` included."""
    crashes = stored(out)
    family = family or qwen2_5_vl({**TEXT, "max_position_embeddings": 512}, VISION)
    folder = Path(tempfile.mkdtemp(prefix="millpond-crash-"))
    try:
        bench = Bench(family, folder, seed + crashes.rounds, frames)
        for _ in tqdm(range(crashes.rounds, rounds), unit="round", mininterval=5, disable=out is None):
            bench.round(crashes)
            if out is not None and crashes.rounds % STORE_EVERY == 0:
                store(out, crashes, seed)
        bench.finish(crashes)
    finally:
        shutil.rmtree(folder)
    if out is not None:
        store(out, crashes, seed)
    return crashes


def stored(out: Path | None) -> Crashes:
    """What an earlier run has left."""
    if out is None or not out.exists():
        return Crashes()
    found = json.loads(out.read_text())["summary"]
    phases = Counter(found.pop("phases"))
    return Crashes(**found, phases=phases)


def store(out: Path, crashes: Crashes, seed: int) -> None:
    result = {
        "what": "kill -9 at random instants of a process that loads, feeds and saves a session of a tiny random Qwen2.5-VL",
        "command": "OMP_NUM_THREADS=1 python bench/crash.py --out bench/results/crash.json",
        "machine": describe(),
        "noise": "a shared machine with other jobs running, which moves the instants and nothing else",
        "aim": {"rounds": 1000, "faults": []},
        "seed": seed,
        "longest_seconds": LONGEST_SECONDS,
        "arguments": ARGUMENTS,
        "summary": {
            "rounds": crashes.rounds,
            "saves": crashes.saves,
            "begun": crashes.begun,
            "beside": crashes.beside,
            "phases": {name: crashes.phases[name] for name in PHASES},
            "faults": crashes.faults,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; rounds that are in it already count")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    crashes = run(options.rounds, options.seed, out=options.out)
    print(f"{crashes.rounds} kills, {crashes.saves} saves, {dict(crashes.phases)}: {len(crashes.faults)} faults")
    for fault in crashes.faults:
        print(fault)
    raise SystemExit(bool(crashes.faults))


if __name__ == "__main__":
    main()
