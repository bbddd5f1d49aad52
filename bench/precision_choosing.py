"""What a selector costs a decoding step: processor time against the same widths fixed, turn by turn.

OMP_NUM_THREADS=1 python bench/precision_choosing.py FOLDER [--turns 201] [--out FILE]

FOLDER is a quantized and calibrated one, such as bench/precision.py leaves under its --work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from precision_costs import overhead

from millpond import precision
from millpond.eval.hardware import describe
from millpond.model_folder import safely
from millpond.precision.calibration import Calibration
from millpond.precision.folder import Description
from millpond.precision.loading import assemble

# Any prose will do: what is timed is one step behind 31 tokens of it.
_TEXT = "A millpond holds back just enough of an endless stream to turn the wheel whenever it is wanted. " * 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=201)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder, **safely(args.folder))
    ids = precision.samples_of(tokenizer, _TEXT, samples=1, length=32)
    model = assemble(args.folder, Description.load(args.folder), lambda name, weight: weight.kept(6, {3, 4, 5, 6}))
    model.precision_hooks = []
    calibration = Calibration.load(args.folder)
    if calibration is None:
        parser.error(f"{args.folder} is not calibrated")
    result = {
        "what": "a decoding step that chooses its widths against one with the same widths fixed, processor time, turn by turn",
        "command": f"OMP_NUM_THREADS=1 python bench/precision_choosing.py FOLDER --turns {args.turns}",
        "machine": describe(),
        "targets": {
            str(target): overhead(model, choices, torch.as_tensor(ids), args.turns)
            for target, choices in sorted(calibration.targets.items())
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
