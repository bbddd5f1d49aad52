"""`infinipot-v-released` beside the authors' own `process_kv_cache`, on random caches, compression after compression.

    OMP_NUM_THREADS=1 python bench/authors/selection.py HEAD FIRST --out bench/results/authors_selection.json

HEAD and FIRST are checkouts of their program at 81a4dbe and 2a3b136 (bench/README.md says how to get them). A run draws a shape, a budget,
pooling or not, and feeds both sides the same blocks; after each compression every layer's kept keys must be the same bits. Counted are
compressions whose layers are all equal; one that differs ends its run, because the caches are different ones from there on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from millpond import policies
from millpond.eval.hardware import describe
from millpond.policies.base import View

RELEASES = {"2026-01": ("81a4dbe", "infinipot-v"), "2025-11": ("2a3b136", "tar_val")}


class Cache:
    """Keys and values of every layer, [1, H, n, D], under the names of both releases."""

    def __init__(self, layers: int) -> None:
        self.layers = [SimpleNamespace(keys=None, values=None) for _ in range(layers)]
        self.key_cache, self.value_cache = Column(self.layers, "keys"), Column(self.layers, "values")

    def get_seq_length(self) -> int:
        return int(self.layers[0].keys.shape[2])


class Column:
    """One tensor of each layer, as a list."""

    def __init__(self, layers: list[SimpleNamespace], name: str) -> None:
        self._layers, self._name = layers, name

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = getattr(self._layers[index], self._name)
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        setattr(self._layers[index], self._name, tensor)


def their_compression(checkout: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"authors_{checkout.name}", checkout / "kvcache_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compress: Callable[..., Any] = module.process_kv_cache
    return compress


def view_of(keys: Tensor, values: Tensor, layer: int, layers: int, size: int, recent: int) -> View:
    heads, tokens = keys.shape[:2]
    protected = torch.zeros(heads, tokens, dtype=torch.bool)
    protected[:, tokens - recent :] = True
    time = (torch.arange(tokens) // size).expand(heads, -1)
    grid_position = torch.zeros(heads, tokens, 2, dtype=torch.int16)
    return View(keys, values, time, grid_position, protected, layer, layers, size, 512)


def run(compress: Callable[..., Any], release: str, draw: random.Random) -> tuple[int, int, dict[str, Any]]:
    """One cache through several compressions: (equal, different) and what was drawn."""
    pooled = draw.random() < 0.75
    few = [4, 8, 12] if pooled and release == "2025-11" else [1, 2, 3, 4, 8]
    rows, cols, layers = draw.randint(1, 9), draw.randint(1, 9), draw.choice(few)
    size, kept, heads, width = rows * cols, draw.randint(4, 12), draw.randint(1, 3), draw.choice([8, 16, 32])
    block, rounds, system = kept + draw.randint(1, 3), 4, draw.randint(1, 5)
    policy = policies.get("infinipot-v-released", adaptive_pooling=pooled, rows=rows, release=release)
    config = SimpleNamespace(height_width=rows, num_hidden_layers=layers)
    inner = SimpleNamespace(layers=range(layers), language_model=SimpleNamespace(layers=range(layers)))
    model, cache = SimpleNamespace(config=config, model=inner), Cache(layers)
    made = torch.Generator().manual_seed(draw.randrange(2**31))
    shape = {"rows": rows, "cols": cols, "layers": layers, "kept": kept, "block": block, "pooled": pooled}
    for turn in range(rounds):
        fresh = system + block * size if turn == 0 else (block - kept) * size
        for layer in cache.layers:
            for name in ("keys", "values"):
                new = torch.randn(1, heads, fresh, width, generator=made)
                old = getattr(layer, name)
                setattr(layer, name, new if old is None else torch.cat([old, new], dim=2))
        recent = policy.recent(block) * size
        expected = []
        for index, layer in enumerate(cache.layers):
            view = view_of(layer.keys[0, :, system:], layer.values[0, :, system:], index, layers, size, recent)
            keep = policy.keep(view, kept * size)
            expected.append(view.keys.gather(1, keep[:, :, None].expand(-1, -1, width)))
        method = RELEASES[release][1]
        compress(cache, model, system, 0, size, kept, method=method, adaptive_pooling=pooled)
        same = all(
            torch.equal(mine, layer.keys[0, :, system:]) for mine, layer in zip(expected, cache.layers, strict=True)
        )
        if not same:
            return turn, 1, shape
    return rounds, 0, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    parser.add_argument("first", type=Path)
    parser.add_argument("--runs", type=int, default=150, help="of each release")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for release, checkout in zip(RELEASES, (args.head, args.first), strict=True):
        compress, draw = their_compression(checkout), random.Random(0)
        equal = different = 0
        examples: list[dict[str, Any]] = []
        for _ in range(args.runs):
            right, wrong, shape = run(compress, release, draw)
            equal, different = equal + right, different + wrong
            examples += [shape] * wrong
        row = {"release": release, "commit": RELEASES[release][0], "runs": args.runs}
        results.append({**row, "equal_compressions": equal, "different": different, "examples": examples[:5]})
    result = {"machine": describe(), "results": results}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
