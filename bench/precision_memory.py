"""Peak of a process that computes sensitivities, above the loaded model; and the 8 bytes a weight that all sums at once would take.

OMP_NUM_THREADS=1 python bench/precision_memory.py --out bench/results/precision_memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from millpond.eval.hardware import describe

LAYERS = (4, 16)
CHILD = """
import ctypes, gc, sys
from pathlib import Path
import torch, transformers
from millpond.precision.decoder import linears
from millpond.precision.sensitivity import sensitivities

config = transformers.LlamaConfig(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=int(sys.argv[1]), num_attention_heads=8, vocab_size=1024
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(0, 1024, (4, 128), generator=torch.Generator().manual_seed(0))
model(ids[:1])  # what torch loads lazily

def kib(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

# Making the model peaks above its own size: that peak, and what it left free in the heap, must not hide what comes.
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS:")
assert kib("VmHWM:") - before < 1024
for found in sensitivities(model, ids):
    del found
print(sum(linear.weight.numel() for _, linear in linears(model)), (kib("VmHWM:") - before) * 1024)
"""


def measured(layers: int) -> dict[str, Any]:
    """One process, one model."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(layers)], capture_output=True, text=True, check=True)
    weights, grown = (int(word) for word in done.stdout.split()[-2:])
    return {
        "decoder_weights": weights,
        "peak_above_model_bytes": grown,
        "bytes_a_weight": round(grown / weights, 2),
        "all_sums_at_once_bytes": 8 * weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "what": "random Llama, hidden 512, 4 runs of 128 tokens; the greatest resident memory of the process above that with the model loaded",
        "command": "OMP_NUM_THREADS=1 python bench/precision_memory.py",
        "machine": describe(),
        "layers": {str(layers): measured(layers) for layers in LAYERS},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
