"""What one forward for several sessions gains over a forward each: decoding, blocks of frames, the vision tower.

    OMP_NUM_THREADS=1 python bench/batching.py --out bench/results/batching.json

Model level: what a session does around its forwards (compaction, text, threads) is left out, and measured with the engine. In every round
the sessions take their turns one after the other and then all together, from the same memory, in processor time; a ratio is of one
round, and what is stored is the median of the rounds with its quartiles.

Minnow's sessions have watched frames of 64 x 64 and lie under 1 MiB each. At a 7B model's layer shapes (hidden 4,096, 32 heads, 8 KV heads
x 128, MLP 12,288, random weights) memories are filled with random keys and values.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from models import qwen2_vl
from torch import Tensor
from tqdm import tqdm

from millpond import Session
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.minnow.checkpoint import folder
from millpond.models import Family, Tokens, load
from millpond.models.batching import Request, encode_batch, forward_batch, logits_batch
from millpond.stream.runner import Runner, dated, grid_positions

EDGE = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AIMS = {"minnow_decoding": 3.0, "minnow_frames": 2.0, "large_decoding": 4.0}


@dataclass(frozen=True)
class Shape:
    """A decoder's proportions; the defaults are those of Qwen3-VL-8B's layers."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 12_288


SMALL = Shape(hidden=256, heads=4, kv_heads=2, mlp=512)


def frames(count: int, seed: int) -> list[Frame]:
    random = np.random.default_rng(seed)
    return [Frame(at / 2, random.integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)) for at in range(count)]


def watched(family: Family, sessions: int) -> list[Runner]:
    """Streams of different lengths, with capacity for a block."""
    runners = []
    for index in range(sessions):
        session = Session(family, budget="1MiB")
        session.feed(frames(80 + 4 * index, index))
        runner = session._runner
        runner.prepare_block(runner.pond.plan.block_tokens)
        runners.append(runner)
    return runners


def large(shape: Shape, layers: int, dtype: torch.dtype) -> Family:
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections(shape)},
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": shape.hidden,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    return qwen2_vl(text, vision, dtype)


def sections(shape: Shape) -> list[int]:
    half = shape.hidden // shape.heads // 2
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def filled(family: Family, sessions: int, tokens: int) -> list[Runner]:
    """Memories of `tokens` random keys and values."""
    runners = []
    for _ in range(sessions):
        session = Session(family, budget=(tokens + 600) * family.geometry.bytes_per_token, policy="recent")
        runner = session._runner
        count = tokens - runner.pond.length
        place = torch.arange(runner.clock.next, runner.clock.next + count)
        time_us, grid_position = torch.zeros(count, dtype=torch.long), torch.full((count, 2), -1, dtype=torch.int16)
        runner.pond.write_metadata(time_us, grid_position, place.expand(family.geometry.axes, -1))
        for layer in runner.pond.layers:
            size = (1, layer.geometry.kv_heads, count, layer.geometry.head_dim)
            layer.update(torch.randn(size, dtype=layer.dtype), torch.randn(size, dtype=layer.dtype))
        runner.clock.next += count
        runners.append(runner)
    return runners


def requests(runners: Sequence[Runner], tokens: Sequence[Tokens], *, text: bool) -> list[Request]:
    made = []
    for runner, own in zip(runners, tokens, strict=True):
        positions = runner.family.assign_positions(own, runner.clock)
        runner.pond.write_metadata(own.time_us, grid_positions(own, text=text), positions)
        made.append(Request(own, positions, runner.pond))
    return made


def good(results: Sequence[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return list(results)


def decode(runners: Sequence[Runner], steps: int, *, together: bool) -> list[list[int]]:
    """Greedy steps of every stream; returns their tokens."""
    family = runners[0].family
    said = [[7 + index] for index in range(len(runners))]
    for _ in range(steps):
        if together:
            asked = requests(runners, [dated(family.embed(own[-1:]), 0) for own in said], text=True)
            rows = [hidden[-1] for hidden in good(forward_batch(family, asked))]
            scores: list[Tensor] = good(logits_batch(family, rows))
            for own, each in zip(said, scores, strict=True):
                own.append(int(each.argmax()))
        else:
            for runner, own in zip(runners, said, strict=True):
                (one,) = requests([runner], [dated(family.embed(own[-1:]), 0)], text=True)
                own.append(int(family.logits(family.forward(one.tokens, one.positions, one.cache)[-1]).argmax()))
    return said


def take_in(runners: Sequence[Runner], blocks: Sequence[tuple[list[np.ndarray], list[int]]], *, together: bool) -> None:
    """A block of frames of every stream."""
    family = runners[0].family
    if together:
        good(forward_batch(family, requests(runners, good(encode_batch(family, blocks)), text=False)))
    else:
        for runner, block in zip(runners, blocks, strict=True):
            (one,) = requests([runner], [family.encode(*block)], text=False)
            family.forward(one.tokens, one.positions, one.cache)


def see(family: Family, blocks: Sequence[tuple[list[np.ndarray], list[int]]], *, together: bool) -> None:
    """The vision tower alone."""
    if together:
        good(encode_batch(family, blocks))
    else:
        for block in blocks:
            family.encode(*block)


def compare(
    name: str, runners: Sequence[Runner], run: Callable[[bool], Any], rounds: int, count: int
) -> dict[str, Any]:
    """Rounds of `run(False)` and `run(True)`, each from the same memory.

    Args:
        count: what one run gives, such as tokens.
    """
    spent: dict[bool, list[float]] = {False: [], True: []}
    said = []
    marks = [runner.mark() for runner in runners]
    for turn in tqdm(range(rounds + 1), unit="round", desc=name):
        for together in (False, True):
            began = process_time()
            said.append(run(together))
            took = process_time() - began
            for runner, mark in zip(runners, marks, strict=True):
                runner.rewind(mark)
            if turn:  # the first warms up
                spent[together].append(took)
    ratios = [alone / packed for alone, packed in zip(spent[False], spent[True], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "ms_each_alone": round(statistics.median(spent[False]) / count * 1e3, 3),
        "ms_each_together": round(statistics.median(spent[True]) / count * 1e3, 3),
        "rounds": rounds,
        **({} if said[0] is None else {"same_tokens": all(one == said[0] for one in said)}),
    }


def minnow(sessions: int, steps: int, rounds: int) -> dict[str, Any]:
    family = load(folder())
    runners = watched(family, sessions)
    results = {
        "decoding": compare(
            "decoding", runners, lambda together: decode(runners, steps, together=together), rounds, sessions * steps
        )
    }
    for count in (2, 8):
        shown = [[family.prepare(frame.pixels) for frame in frames(count, 100 + index)] for index in range(sessions)]
        blocks = [(each, [500_000 * (200 + at) for at in range(count)]) for each in shown]
        for name, run in (
            ("frames", lambda together, blocks=blocks: take_in(runners, blocks, together=together)),
            ("vision tower alone", lambda together, blocks=blocks: see(family, blocks, together=together)),
        ):
            key = f"{name}, blocks of {count}"
            results[key] = compare(key, runners, run, rounds, sessions * count)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout gets it too")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2, help="of the large shapes")
    parser.add_argument("--memory", type=int, default=2048, help="tokens that each large memory holds")
    parser.add_argument(
        "--steps",
        type=int,
        default=16,
        help="decoding steps of Minnow in a round; a quarter of that of the large shapes",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="toy layers, to see in seconds that the bench runs")
    options = parser.parse_args()
    results = {"minnow": minnow(options.sessions, options.steps, options.rounds)}
    for name, dtype in DTYPES.items():
        family = large(SMALL if options.small else Shape(), options.layers, dtype)
        runners, steps = filled(family, options.sessions, options.memory), max(1, options.steps // 4)
        results[f"large, {name}"] = {
            "decoding": compare(
                name,
                runners,
                lambda together, runners=runners, steps=steps: decode(runners, steps, together=together),
                options.rounds,
                options.sessions * steps,
            )
        }
        del family, runners
        gc.collect()
    result = {
        "what": f"{options.sessions} sessions: a forward each against one for all; ratio of processor times, median and quartiles",
        "command": "OMP_NUM_THREADS=1 python bench/batching.py --out bench/results/batching.json",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; processor time; compare the ratios",
        "aim": AIMS,
        "large": {"layers": options.layers, "memory_tokens": options.memory},
        "results": results,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
