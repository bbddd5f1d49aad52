"""What part of ingest goes into selection and compaction at a 7B model's proportions.

    OMP_NUM_THREADS=1 python bench/overhead.py --out bench/results/overhead.json

A Qwen2-VL with the 7B's real decoder layers (hidden 3,584, 28 heads, 4 KV heads x 128, MLP 18,944), 2 of the 28, random weights and a tiny
vocabulary, watches frames of 336 x 336 (144 tokens a pair of frames) with a memory of about 6,000 tokens under infinipot-v. The
decoder and the compaction both cost the same in every layer, so their ratio is that of all 28.

The share is compaction / (decoder + compaction), from the session's own stage clocks, block by block once the memory is full
(compaction takes in making room, the selection, the moves, and re-anchoring if any). The clocks are set to processor time: on a
shared machine the long decoder run waits for a core more often than a short compaction does, and by the wall clock
that would flatter the share. To save minutes, the memory is first filled with random keys and values in place of the decoder's.
The vision tower is a stub of one narrow layer and its time is left out; a real one would make the share smaller. The default is
float32: without bfloat16 instructions a CPU emulates it in the decoder, and a slow decoder flatters the share. A fast one does
the opposite, so the result also says up to which decoder speed the aim would hold with the compaction as measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from models import qwen2_vl
from torch import Tensor
from tqdm import tqdm

from millpond import Session, ops
from millpond import session as session_module
from millpond.eval.hardware import describe
from millpond.frames import Frame
from millpond.models import Family, Tokens
from millpond.stream import runner as runner_module

FPS = 2.0
AIM = 0.005
EDGE = 336  # 12 x 12 merged patches of 28: 144 tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A decoder's proportions. The defaults are Qwen2-VL-7B's."""

    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    mlp: int = 18_944


SMALL = Shape(hidden=512, heads=4, kv_heads=2, mlp=1024)


def build(shape: Shape, layers: int, dtype: torch.dtype) -> Family:
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
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


def stream(first: int, count: int) -> Iterator[Frame]:
    """Noise: what the frames show does not change what selecting among their tokens costs."""
    for index in range(first, first + count):
        pixels = np.random.default_rng(index).integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)
        yield Frame(index / FPS, pixels)


def fill(tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
    """Stands in for `Family.forward` while the memory fills: random keys and values, nothing computed."""
    for layer in cache.layers:
        size = (1, layer.geometry.kv_heads, len(tokens), layer.geometry.head_dim)
        layer.update(torch.randn(size, dtype=layer.dtype), torch.randn(size, dtype=layer.dtype))
    return tokens.embeds


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, in ms where the values are seconds."""
    return {
        name: round(f(values) * 1e3, 3) for name, f in (("median", statistics.median), ("least", min), ("most", max))
    }


def measure(shape: Shape, layers: int, dtype: torch.dtype, tokens: int, blocks: int) -> dict[str, object]:
    """Fill the memory, then clock `blocks` blocks. `tokens`: slots of the pond."""
    began = perf_counter()
    family = build(shape, layers, dtype)
    session = Session(family, budget=tokens * family.geometry.bytes_per_token, policy="infinipot-v")
    plan = session.plan_for(EDGE, EDGE)
    size = plan.block_groups * plan.frames_per_group
    fed = 0
    family.forward = fill  # type: ignore[method-assign]
    while session.usage.compactions == 0:
        session.feed(stream(fed, size))
        fed += size
    del family.forward
    decoder, compaction, vision, passes = [], [], [], []
    for turn in tqdm(range(blocks + 1), unit="block", desc=str(dtype)):
        before = session.usage
        session.feed(stream(fed, size))
        after = session.usage
        fed += size
        if turn:  # the first warms up
            decoder.append(after.seconds_decoder - before.seconds_decoder)
            compaction.append(after.seconds_compaction - before.seconds_compaction)
            vision.append(after.seconds_vision - before.seconds_vision)
            passes.append(after.compactions - before.compactions)
    shares = [spent / (spent + ran) for spent, ran in zip(compaction, decoder, strict=True)]
    total = sum(compaction) / (sum(compaction) + sum(decoder))
    weights = 2 * shape.hidden + 2 * shape.kv_heads * shape.hidden // shape.heads + 3 * shape.mlp
    gflop = 2 * layers * plan.block_tokens * shape.hidden * (weights + 2 * plan.memory_tokens) / 1e9
    return {
        "budget_bytes": plan.budget,
        "memory_tokens": plan.memory_tokens,
        "headroom_tokens": plan.headroom_tokens,
        "frame_tokens": plan.group_tokens,
        "block_tokens": plan.block_tokens,
        "blocks": blocks,
        "compactions": sum(passes),
        "share_of_totals": round(total, 6),
        "share_median_block": round(statistics.median(shares), 6),
        "share_most": round(max(shares), 6),
        "decoder_ms_a_block": spread(decoder),
        "compaction_ms_a_block": spread(compaction),
        "compaction_ms_a_pass_and_layer": round(sum(compaction) / max(1, sum(passes)) / layers * 1e3, 3),
        "stub_vision_ms_a_block": spread(vision),
        "decoder_gflop_a_block": round(gflop, 1),
        "decoder_gflop_per_second": round(gflop / statistics.median(decoder), 1),
        "aim_holds_up_to_gflop_per_second": round(gflop * AIM / (1 - AIM) * blocks / sum(compaction), 1),
        "seconds": round(perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout gets it too")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default: float32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--slots", type=int, default=7_600, help="token slots of the pond; 7,600 leave a memory of about 6,000"
    )
    parser.add_argument("--blocks", type=int, default=10, help="blocks to clock once the memory is full")
    parser.add_argument("--small", action="store_true", help="toy layers, to see in seconds that the bench runs")
    options = parser.parse_args()
    session_module.perf_counter = process_time
    runner_module.perf_counter = process_time
    shape = SMALL if options.small else Shape()
    result = {
        "what": "share of ingest spent in selection and compaction, infinipot-v, decoder layers of "
        + ("a toy" if options.small else "Qwen2-VL-7B"),
        "command": "OMP_NUM_THREADS=1 python bench/overhead.py --out bench/results/overhead.json",
        "machine": describe(),
        "noise": "a shared machine with other jobs running; processor time; compare the shares, not the milliseconds",
        "kernels": "compiled" if ops.status().endswith(".so") else ops.status(),
        "aim": {"share_of_totals": f"<= {AIM}"},
        "layers": {"run": options.layers, "of": 28},
        "vision": "left out: a stub",
        "results": {
            name: measure(shape, options.layers, DTYPES[name], options.slots, options.blocks)
            for name in options.dtype or ["float32"]
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
