"""Share of ingest time that selection and compaction take, at Qwen2-VL-7B's shapes.

    OMP_NUM_THREADS=2 python bench/overhead.py --out bench/results/overhead.json

The decoder layers are the 7B model's (hidden 3,584, 28 query and 4 KV heads of 128, MLP 18,944), random, 2 of 28 of them: decoder
and compaction both cost the same for every layer, so the share does not depend on how many there are. Frames are blocks of
random embeddings of 144 tokens (12 x 12); the vision tower is left out, so the share of the whole ingest is smaller than stated. The
memory holds 6,144 tokens and is full before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from machine import describe
from transformers import Qwen2Config, Qwen2Model

from millpond import native, policies
from millpond.cache import Pond
from millpond.geometry import Geometry
from millpond.plan import make_plan

ROWS = COLS = 12
FRAME = ROWS * COLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policy", default="infinipot-v")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=options.layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )
    model = Qwen2Model(config).eval().to(dtype)
    geometry = Geometry.from_config(config, dtype, axes=3)
    policy = policies.get(options.policy)
    budget = options.tokens * geometry.bytes_per_token * 21 // 20
    plan = make_plan(budget, geometry, policy, prompt_tokens=0, group_tokens=FRAME, reserve_tokens=0)
    pond = Pond(geometry, plan, policy, torch.device("cpu"))
    place = torch.stack(torch.meshgrid(torch.arange(ROWS), torch.arange(COLS), indexing="ij"), -1).view(-1, 2)
    groups = plan.block_groups
    count = groups * FRAME
    decoder = compaction = 0.0
    blocks = measured = 0
    total = -(-options.frames // groups)
    with torch.no_grad():
        while measured < total:
            times = (torch.arange(groups) + blocks * groups).repeat_interleave(FRAME) * 500_000
            began = perf_counter()
            pond.admit(count)
            admitted = perf_counter() - began
            position = torch.arange(pond.length, pond.length + count)
            pond.announce(times, place.repeat(groups, 1).to(torch.int16), position.expand(3, -1))
            full = pond.compactions > 0
            if full:
                embeds = torch.randn(1, count, config.hidden_size, dtype=dtype)
                began = perf_counter()
                model(inputs_embeds=embeds, position_ids=position[None], past_key_values=pond, use_cache=True)
                decoder += perf_counter() - began
                compaction += admitted
                measured += 1
                print(f"\r{measured}/{total}", end="", file=sys.stderr)
            else:  # fill the memory without paying for the decoder
                for index in range(options.layers):
                    keys = torch.randn(1, geometry.kv_heads, count, geometry.head_dim, dtype=dtype)
                    pond.update(keys, torch.randn_like(keys), index)
            pond.commit(times, place.repeat(groups, 1).to(torch.int16))
            blocks += 1
    print(file=sys.stderr)
    frames = measured * groups
    result = {
        "what": f"selection and compaction against the decoder alone, {options.layers} of Qwen2-VL-7B's 28 layers, {options.dtype}",
        "machine": describe(),
        "noise": "a shared machine with other jobs running",
        "kernels": "compiled" if native.status().endswith(".so") else native.status(),
        "aim": {"share_of_ingest": "<= 0.005"},
        "policy": options.policy,
        "memory_tokens": plan.memory_tokens,
        "room_tokens": plan.room_tokens,
        "frames": frames,
        "compactions": pond.compactions,
        "milliseconds_a_frame_and_layer": {
            "decoder": round(decoder / frames / options.layers * 1e3, 2),
            "compaction": round(compaction / frames / options.layers * 1e3, 3),
        },
        "share_of_ingest": round(compaction / (compaction + decoder), 5),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
