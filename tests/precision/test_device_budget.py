"""The split of a device's memory: its parts add up, the minimum works, and weights and workspace are what is measured."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond import Session, precision
from millpond.errors import BudgetError, PrecisionError
from millpond.frames import Frame
from millpond.memory.geometry import Geometry
from millpond.precision.device_budget import Workspace, split_device, weight_bytes
from millpond.precision.loading import stored_bytes
from tests.models.tiny import tiny
from tests.precision.models import runs
from tests.session.measure import transient_peak

GEOMETRY = Geometry(layers=4, kv_heads=2, head_dim=32, dtype=torch.float32)


@settings(deadline=None, max_examples=100)
@given(
    extra=st.integers(0, 10_000_000),
    sizes=st.lists(st.integers(1, 1_000_000), min_size=1, max_size=6, unique=True),
    fixed=st.integers(0, 100_000),
    per_slot=st.integers(0, 5000),
    kv_minimum=st.integers(1, 100_000),
)
def test_parts_add_up_and_never_pass_the_device(
    extra: int, sizes: list[int], fixed: int, per_slot: int, kv_minimum: int
) -> None:
    weights, workspace = dict(enumerate(sorted(sizes), 3)), Workspace(fixed, per_slot)
    with pytest.raises(BudgetError) as caught:
        split_device(1, weights, GEOMETRY, workspace, kv_minimum=kv_minimum)
    minimum = caught.value.minimum
    assert minimum is not None
    with pytest.raises(BudgetError, match=f"the minimum that works is {minimum} bytes"):
        split_device(minimum - 1, weights, GEOMETRY, workspace, kv_minimum=kv_minimum)
    split = split_device(minimum + extra, weights, GEOMETRY, workspace, kv_minimum=kv_minimum)
    assert split.weights + split.kv + split.workspace == minimum + extra
    assert split.kv >= kv_minimum
    assert split.bits is not None
    assert weights[split.bits] == split.weights
    # The workspace is enough for as many slots as the stream can have.
    assert split.workspace >= fixed + per_slot * (split.kv // GEOMETRY.bytes_per_token)


@given(st.integers(0, 5_000_000), st.integers(0, 5_000_000))
@settings(deadline=None, max_examples=50)
def test_more_memory_is_never_less_of_anything(first: int, second: int) -> None:
    weights, workspace = {3: 300_000, 4: 400_000, 6: 600_000}, Workspace(10_000, 100)
    few, many = (
        split_device(400_000 + extra, weights, GEOMETRY, workspace, kv_minimum=20_000)
        for extra in sorted((first, second))
    )
    assert few.weights <= many.weights
    assert few.bits is not None
    assert many.bits is not None
    assert few.bits <= many.bits


def test_fixed_weights_leave_the_rest_to_the_stream() -> None:
    split = split_device(1 << 20, 300_000, GEOMETRY, Workspace(1000, 10), kv_minimum=1)
    assert (split.weights, split.bits) == (300_000, None)
    slots = (1 << 20) - 301_000
    assert split.slots == slots // (GEOMETRY.bytes_per_token + 10)


def test_weights_take_what_the_headers_say(stored: Path, tmp_path: Path) -> None:
    sizes = weight_bytes(stored)
    assert isinstance(sizes, dict)
    assert list(sizes) == [3, 4, 5, 6, 7, 8]
    for bits in (3, 6):
        model = precision.load(stored, bits=bits)
        buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
        assert stored_bytes(model) - buffers == sizes[bits]
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    precision.calibrate(folder, runs(samples=2), [3.5, 4.5], quiet=True)
    model = precision.load(folder, target_bits=3.5)
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    assert stored_bytes(model) - buffers == weight_bytes(folder)
    (folder / "layer-000.safetensors").write_bytes(b"short")
    with pytest.raises(PrecisionError, match=r"layer-000\.safetensors cannot be read"):
        weight_bytes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("budget", ["256KiB", "1MiB"])
def test_the_workspace_is_at_least_what_the_allocator_sees(name: str, budget: str) -> None:
    family = tiny(name)
    session, rng = Session(family, budget=budget), np.random.default_rng(0)
    plan, grid = session.plan_for(56, 56), family.grid(56, 56)
    count = 2 * plan.slots // plan.group_tokens * plan.frames_per_group
    frames = [Frame(index / 2, rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for index in range(count + 8)]
    session.feed(frames[:-8])
    patch = family.model.config.vision_config.patch_size
    patches = plan.block_groups * plan.frames_per_group * (grid.height // patch) * (grid.width // patch)
    counted = Workspace.of(family.model.config, family.geometry, block_tokens=plan.block_tokens, patches=patches)
    seen = transient_peak(lambda: session.feed(frames[-8:]))
    assert seen <= counted.fixed + counted.per_slot * plan.slots
