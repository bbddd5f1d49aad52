"""A device's budget against the resident memory of a process of its own, as the system counts it: not what torch believes to hold."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from millpond import BudgetError, Session, precision
from millpond.precision.nested import NestedWeight
from tests.models.tiny import tiny

CHILD = """
import ctypes, gc, sys
import numpy as np
from millpond import Session
from millpond.frames import Frame
from millpond.precision.loading import stored_bytes

def run(folder, memory):
    session = Session.from_pretrained(folder, device_memory=memory, frame_size=(56, 56))
    pixels = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    session.feed([Frame(index / 2, pixels) for index in range(int(sys.argv[3]))])
    session.ask("what", max_new_tokens=2)
    assert session.usage.compactions > 0
    return session

def tell(held):
    gc.collect()
    print(held, flush=True)
    sys.stdin.readline()

run(sys.argv[1], "8MiB")  # whatever is loaded and built once
for memory in sys.argv[4:]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nothing that is free already may hide what comes
    tell(0)
    session = run(sys.argv[2], int(memory))
    tell(stored_bytes(session.family.model) + session.usage.budget_bytes)
    del session
"""


def resident(folder: Path, small: Path, budgets: list[int], frames: int = 24) -> list[tuple[int, int, int]]:
    """By how many bytes the process has grown with a session of each budget that has seen frames and answered: at most, and at rest; and what its
    weights and its stream may take."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(small), str(folder), str(frames), *map(str, budgets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    system, seen = Path(f"/proc/{child.pid}"), []
    with child:
        for _ in range(2 * len(budgets)):
            held = int(child.stdout.readline())
            status = dict(line.split(":", 1) for line in (system / "status").read_text().splitlines())
            seen.append((held, *(int(status[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))))
            (system / "clear_refs").write_text("5")  # the peak begins anew
            child.stdin.write("\n")
            child.stdin.flush()
    pairs = zip(seen[::2], seen[1::2], strict=True)
    return [(peak - before, rest - before, held) for (_, before, _), (held, rest, peak) in pairs]


def planes_at_random(weight: torch.Tensor, _: torch.Tensor, *, low: int, high: int) -> NestedWeight:
    """In the place of clustering, which would take a minute: the bytes are the same."""
    (rows, columns), rng = weight.shape, torch.Generator().manual_seed(0)
    planes = torch.randint(0, 256, (rows, high, -(-columns // 8)), dtype=torch.uint8, generator=rng)
    tables = {bits: torch.rand(rows, 1 << bits, generator=rng).half() / 50 for bits in range(low, high + 1)}
    return NestedWeight(planes, tables, columns)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and needs glibc's malloc_trim for a baseline")
def test_a_process_stays_within_the_device_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases, which once kept every layer's file mapped; at rest, what the heap holds of memory that is free shows."""
    monkeypatch.setattr(sys.modules["millpond.precision.quantize"], "nest", planes_at_random)
    family, ids = tiny("qwen2_5_vl"), torch.randint(0, 50, (1, 16))
    config = family.model.config
    small, folder = tmp_path / "small", tmp_path / "large"
    precision.quantize(family.model, family.tokenizer, small, ids, source="tiny", quiet=True)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 512, 1536, 8
    text.layer_types = ["full_attention"] * 6
    text.num_hidden_layers, text.rope_parameters["mrope_section"] = 6, [8, 12, 12]
    config.vision_config.out_hidden_size = 512
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    precision.quantize(model, family.tokenizer, folder, ids, source="tiny", quiet=True)
    with pytest.raises(BudgetError) as caught:
        Session.from_pretrained(folder, device_memory="1MiB", frame_size=(56, 56))
    minimum = caught.value.minimum
    assert minimum is not None
    budgets = [minimum, 2 * minimum]
    for budget, (peak, rest, held) in zip(budgets, resident(folder, small, budgets), strict=True):
        assert peak <= budget
        # 4 MiB, less than the file of one layer: Python's objects, and pages of the heap that something in use shares, which vary
        # from process to process (0.7 to 2.5 MiB in seven).
        assert held / 2 < rest <= held + (4 << 20)
