"""millpond beside the authors' own program: the same weights, streams and question tokens; right answers, and processor time of ingest.

    OMP_NUM_THREADS=1 python bench/authors/compare.py CHECKOUT --their-python PYTHON --out bench/results/authors.json

CHECKOUT is a copy of their program and PYTHON an environment with the transformers that it asks for; bench/README.md says how to make both.
Their program watches, compresses and answers by itself (theirs.py only hands it Minnow). Its questions are asked twice: "released", as the
program has it, which starts a question its own length too late, and "corrected", where the prompt has it.

- Equal memory: a session under a budget holds so many tokens before a compaction; theirs gets the whole frame groups that this makes, rounded
  up, and as many groups a step as ours runs at once. Its prompt, questions and answers lie outside of them; its positions run on past
  the trained range.
- Ingest: processor seconds a frame, one thread each, in turns: ours watches a stream, then theirs the same one, `--rounds` times. "behind
  vision": both are handed the vision tower's features. "whole": both look themselves; theirs is handed normalised patches, ours raw frames.
- Answers are compared question by question (the exact sign test); the interval of the difference resamples whole streams (bootstrap).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from millpond import Session, models
from millpond.eval import streams
from millpond.eval.accuracy.cell import read_budget
from millpond.eval.accuracy.intervals import sign_flips, wilson
from millpond.eval.hardware import describe
from millpond.minnow import SUPPORTED, checkpoint
from millpond.models.base import Tokens
from millpond.models.qwen2_vl import Qwen2VL

FORMS = ("corrected", "released")


class Theirs:
    """Their program in a process of its own; one request at a time."""

    def __init__(self, python: Path, checkout: Path) -> None:
        worker = Path(__file__).with_name("theirs.py")
        command = [str(python), str(worker), str(checkout), str(checkpoint.folder())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.machine = self._read()

    def run(self, file: Path, groups: tuple[int, int], *, seen: bool, answers: tuple[str, ...] = ()) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = {"file": str(file), "block": groups[0], "kept": groups[1], "seen": seen, "answers": answers}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("their program ended: what it said is above")
        reply: dict[str, Any] = json.loads(line)
        return reply


class Watched:
    """One stream, ready for both: frames for ours, a file of tensors for theirs.

    Attributes:
        frames: (seconds, pixels). questions: those without an earlier turn, of the types that Minnow supports.
        seen: the family, with its vision tower's answers remembered. file: for theirs.
    """

    def __init__(self, family: Qwen2VL, seed: int, groups: int, level: str, folder: Path) -> None:
        stream = streams.generate(seed, groups=groups, level=level, split="test")
        self.frames = list(stream.frames())
        self.questions = [one for one in stream.questions if one.type in SUPPORTED and one.earlier is None]
        self.seen = looked_at(family)
        times = [round(seconds * 1e6) for seconds, _ in self.frames]
        prepared = [family.prepare(pixels) for _, pixels in self.frames]
        patches, grid = family.patches(prepared)
        size = family.frames_per_group * 4  # the blocks that a session would look at
        features = [
            self.seen.encode(prepared[i : i + size], times[i : i + size]).embeds for i in range(0, len(prepared), size)
        ]
        tensors = {"patches": patches, "grid": grid, "features": torch.cat(features)}
        tensors["opening"] = torch.tensor(family.chat.before_video(None))
        for index, question in enumerate(self.questions):
            tensors[f"question{index:02d}"] = torch.tensor(family.chat.after_video(question.text))
        self.file = folder / "stream.npz"
        np.savez(self.file, **{name: tensor.numpy() for name, tensor in tensors.items()})


def looked_at(family: Qwen2VL) -> Qwen2VL:
    """The same family, whose vision tower looks at each block of frames once, however many sessions watch the stream."""
    seen: dict[tuple[int, ...], Tokens] = {}

    def encode(frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        block = tuple(times_us)
        if block not in seen:
            seen[block] = family.encode(frames, times_us)
        return seen[block]

    other = copy.copy(family)
    other.encode = encode  # type: ignore[method-assign]
    return other


def ours(family: Qwen2VL, watched: Watched, budget: int) -> tuple[Session, float]:
    session = Session(family, budget=budget)
    began = process_time()
    session.feed(watched.frames)
    return session, process_time() - began


def equal_groups(session: Session) -> tuple[int, int]:
    """Groups that theirs holds before and after a compression, where ours holds memory and room."""
    plan = session.plan
    block = -(-(plan.memory_tokens + plan.headroom_tokens) // plan.group_tokens)
    return block, block - plan.block_groups


def right(answers: list[list[int]], watched: Watched, family: Qwen2VL) -> list[bool]:
    said = [family.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return [text.strip().lower() == one.answer.lower() for text, one in zip(said, watched.questions, strict=True)]


def accuracy(
    family: Qwen2VL, theirs: Theirs, args: argparse.Namespace, groups: int, shares: list[Fraction]
) -> list[dict[str, Any]]:
    """One row a budget: how many questions each answers right."""
    marks: dict[Fraction, dict[str, list[list[bool]]]] = {share: {} for share in shares}
    sizes: dict[Fraction, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(args.streams), desc=f"answers, {groups} groups"):
            watched = Watched(family, seed, groups, args.level, Path(folder))
            for share in shares:
                session, _ = ours(watched.seen, watched, int(share * full_bytes(family, groups)))
                asked = [session.ask(one.text, max_new_tokens=4).text for one in watched.questions]
                mine = [
                    text.strip().lower() == one.answer.lower()
                    for text, one in zip(asked, watched.questions, strict=True)
                ]
                sizes[share] = equal_groups(session)
                answers = theirs.run(watched.file, sizes[share], seen=True, answers=FORMS)["answers"]
                row = marks[share]
                row.setdefault("millpond", []).append(mine)
                for form in FORMS:
                    row.setdefault(form, []).append(right(answers[form], watched, family))
    return [
        {
            "groups": groups,
            "level": args.level,
            "budget": str(share),
            "streams": args.streams,
            "their_groups": {"before": sizes[share][0], "after": sizes[share][1]},
            **{name: vars(wilson(sum(map(sum, each)), sum(map(len, each)))) for name, each in row.items()},
            "against_corrected": against(row["millpond"], row["corrected"]),
        }
        for share, row in marks.items()
    ]


def against(mine: list[list[bool]], theirs: list[list[bool]]) -> dict[str, Any]:
    """Points by which ours is ahead, with an interval over streams, and questions that only one of them answered."""
    each = [(sum(a) - sum(b), len(a)) for a, b in zip(mine, theirs, strict=True)]
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a, b, strict=True)]
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    drawn = np.random.default_rng(0).integers(0, len(each), (10_000, len(each)))
    ahead, asked = np.array(each)[drawn].sum(axis=1).T
    low, high = np.quantile(100 * ahead / asked, (0.025, 0.975)).round(1).tolist()
    points = 100 * (won - lost) / len(pairs)
    return {
        "points": round(points, 1),
        "low": low,
        "high": high,
        "won": won,
        "lost": lost,
        "p": round(sign_flips([1] * won + [-1] * lost), 6),  # of single questions: the exact sign test
    }


def ingest(
    family: Qwen2VL, theirs: Theirs, args: argparse.Namespace, groups: int, shares: list[Fraction]
) -> list[dict[str, Any]]:
    """One row a budget and kind: processor ms a frame of both, and their ratio round by round."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        watched = Watched(family, 0, groups, args.level, Path(folder))
        for seen in (True, False):
            for share in tqdm(shares, desc=f"ingest, {'behind vision' if seen else 'whole'}"):
                budget, mine, other = int(share * full_bytes(family, groups)), [], []
                used = watched.seen if seen else family
                session, _ = ours(used, watched, budget)  # warm
                sizes = equal_groups(session)
                theirs.run(watched.file, sizes, seen=seen)
                for _ in range(args.rounds):
                    mine.append(ours(used, watched, budget)[1] * 1e3 / len(watched.frames))
                    other.append(theirs.run(watched.file, sizes, seen=seen)["seconds"] * 1e3 / len(watched.frames))
                ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
                rows.append(
                    {
                        "groups": groups,
                        "kind": "behind vision" if seen else "whole",
                        "budget": str(share),
                        "their_groups": {"before": sizes[0], "after": sizes[1]},
                        "rounds": args.rounds,
                        "millpond_ms": round(statistics.median(mine), 3),
                        "theirs_ms": round(statistics.median(other), 3),
                        "ratio": round(statistics.median(ratios), 3),
                        "ratio_quartiles": [round(value, 3) for value in np.quantile(ratios, (0.25, 0.75))],
                    }
                )
    return rows


def full_bytes(family: Qwen2VL, groups: int) -> int:
    return groups * family.grid(64, 64).tokens * family.geometry.kv_bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--their-python", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--level", default="standard")
    parser.add_argument("--answers", default="256:1/4,1/8,1/16;64:1/8", help="GROUPS:BUDGETS;... or nothing")
    parser.add_argument("--ingest", default="256:1/2,1/4,1/8,1/16,1/32", help="GROUPS:BUDGETS;... or nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = models.load("minnow")
    assert isinstance(family, Qwen2VL)
    theirs = Theirs(args.their_python, args.checkout)
    result: dict[str, Any] = {"machine": describe(), "their_environment": theirs.machine}
    for name, measure in (("ingest", ingest), ("answers", accuracy)):
        result[name] = [
            row
            for part in filter(None, getattr(args, name).split(";"))
            for row in measure(
                family, theirs, args, int(part.split(":")[0]), [_share(one) for one in part.split(":")[1].split(",")]
            )
        ]
    theirs.close()
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _share(text: str) -> Fraction:
    budget = read_budget(text)
    if not isinstance(budget, Fraction):
        raise SystemExit(f"a budget here is a share of the full cache, such as 1/8, not {text}")
    return budget


if __name__ == "__main__":
    main()
