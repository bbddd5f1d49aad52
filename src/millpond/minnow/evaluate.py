"""Accuracy of Minnow with a full cache, per question family: `python -m millpond.minnow.evaluate --out card.json`.

Streams go through `millpond.Session` with the policy "full", as frames straight from the generator and as real MP4 files.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from millpond.streams import Stream, generate

if TYPE_CHECKING:
    from millpond.families import Family

__all__ = ["SUPPORTED", "Accuracy", "evaluate", "main", "wilson"]

SUPPORTED = ("colour", "object", "where", "appear", "digit", "first", "last", "now")
"""Question families that Minnow is trained on and ships for."""


@dataclass(frozen=True)
class Accuracy:
    """Right answers among those asked, with the 95 % interval of Wilson (1927)."""

    right: int
    asked: int
    share: float
    low: float
    high: float


def wilson(right: int, asked: int) -> Accuracy:
    """The Wilson score interval at 95 %."""
    if asked == 0:
        return Accuracy(0, 0, 0.0, 0.0, 1.0)
    z, share = 1.959964, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return Accuracy(right, asked, round(share, 4), round(middle - half, 4), round(middle + half, 4))


def evaluate(
    family: Family, streams: Sequence[Stream], families: Sequence[str] = SUPPORTED, *, through_mp4: bool
) -> dict[str, Accuracy]:
    """Accuracy per question family and over all ("all"), full cache, each question asked at the end of its stream."""
    from millpond import Session, frames

    marks: dict[str, list[bool]] = {name: [] for name in families}
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        for stream in streams:
            session = Session(family, budget=None, policy="full")
            if through_mp4:
                path = Path(folder) / "stream.mp4"
                stream.write(path)
                session.feed(frames.open(path))
            else:
                session.feed(stream.frames())
            for question in stream.questions:
                if question.family in marks and question.earlier is None:
                    answer = session.ask(question.text, max_new_tokens=4)
                    marks[question.family].append(answer.text.strip() == question.answer)
    every = [mark for row in marks.values() for mark in row]
    return {name: wilson(sum(row), len(row)) for name, row in {**marks, "all": every}.items()}


def main() -> None:
    import torch

    from millpond import families
    from millpond.minnow.checkpoint import folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", type=Path, help="a folder; by default the weights in the package")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--split", default="test")
    parser.add_argument("--levels", nargs="+", default=["standard"])
    parser.add_argument("--raw-only", action="store_true", help="leave the MP4 run out")
    parser.add_argument("--out", type=Path, help="JSON file to write; standard output by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = families.load(arguments.model or folder())
    results: dict[str, dict[str, dict[str, Accuracy]]] = {}
    for level in arguments.levels:
        made = [
            generate(seed, groups=arguments.groups, level=level, split=arguments.split)
            for seed in range(arguments.streams)
        ]
        results[level] = {"raw": evaluate(model, made, through_mp4=False)}
        if not arguments.raw_only:
            results[level]["mp4"] = evaluate(model, made, through_mp4=True)
    card = {
        "streams": arguments.streams,
        "seeds": [0, arguments.streams - 1],
        "groups": arguments.groups,
        "split": arguments.split,
        "policy": "full",
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()},
        "accuracy": {
            level: {way: {name: asdict(a) for name, a in table.items()} for way, table in ways.items()}
            for level, ways in results.items()
        },
    }
    text = json.dumps(card, indent=1) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
