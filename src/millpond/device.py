"""One budget for a whole device: weights, the stream's memory and the workspace of a forward pass, planned together.

Joins a family, `millpond.stream.runner`'s plan of a stream and `millpond.precision`'s split; allocates nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millpond import models
from millpond.cache.plan import Plan
from millpond.config import SessionConfig
from millpond.errors import BudgetError, ModelError
from millpond.memory.available import available_memory, check_memory
from millpond.memory.budget import Budget
from millpond.memory.heap import hold_nothing
from millpond.models.base import Family, Grid
from millpond.models.batching import ENCODED_AT_ONCE
from millpond.precision.device_budget import DeviceSplit, Workspace, split_device, weight_bytes
from millpond.precision.folder import is_quantized
from millpond.stream.runner import Runner

DEFAULT_FRAME = (480, 640)
"""Height and width of a frame where nobody says."""
_LIMITS = 24
_DEFAULT_SECONDS, _DEFAULT_FPS = 60, 2.0
_STEP = 1 << 20
_HEAP = 2 << 20
"""Allowance for resident bytes that no tensor has: Python's objects, heap pages that something in use shares."""


@dataclass(frozen=True)
class DevicePlan:
    """How a device's memory is used: `split` between weights, stream and workspace, and the stream's own `plan`."""

    split: DeviceSplit
    plan: Plan


def plan_device(
    family: Family, folder: str | Path | None, device_memory: str | int, frame: tuple[int, int], config: SessionConfig
) -> DevicePlan:
    """Split a device's memory for a model and a stream.

    Args:
        family: with or without its weights.
        folder: where the model lies; its quantized weights, if it has any, are read at a bit-width that fits. None for a loaded model.
        device_memory: all bytes of the device that millpond may use.
        frame: height and width of the largest frame, in pixels.
        config: of the stream; its budget counts for nothing here.

    Raises:
        BudgetError: not even the minimum of everything fits; names it, or the policy has no cap.
    """
    if not config.policy.capped:
        raise BudgetError(f"the policy {config.policy.name!r} has no cap: no device memory would be enough")
    memory, grid = int(Budget(device_memory)), family.grid(*frame)
    weights: int | dict[int, int] = _weights(family.model)
    if folder is not None and is_quantized(folder):
        weights = weight_bytes(Path(folder))
    lightest = weights if isinstance(weights, int) else min(weights.values())
    minimum = minimum_budget(family, grid, config)
    patch = family.model.config.vision_config.patch_size

    def limited(limit: int) -> DeviceSplit:
        """The split with a stream of at most `limit` bytes."""
        plan = _plan(family, grid, config, limit)
        frames = plan.block_groups * plan.frames_per_group
        workspace = Workspace.of(
            family.model.config,
            family.geometry,
            block_tokens=max(plan.block_tokens, plan.turn_tokens, plan.prompt_tokens),
            patches=frames * (grid.height // patch) * (grid.width // patch),
        )
        workspace = replace(workspace, fixed=workspace.fixed + _HEAP)
        split = split_device(memory, weights, family.geometry, workspace, kv_minimum=minimum)
        kv = min(split.kv, limit)
        return replace(split, kv=kv, workspace=memory - split.weights - kv, slots=kv // family.geometry.bytes_per_token)

    # A larger stream runs in larger blocks, which take more workspace: the workspace is planned for a stream of at most so many
    # bytes, for a few such limits, and the one that leaves the stream most is taken.
    ratio = max(1.0, (memory - lightest) / minimum)
    split = limited(minimum)
    for step in range(1, _LIMITS + 1):
        try:
            split = max(split, limited(int(minimum * ratio ** (step / _LIMITS))), key=lambda one: one.kv)
        except BudgetError:  # blocks of that size do not fit beside the rest
            break
    return DevicePlan(split, _plan(family, grid, config, split.kv))


def load_for_streams(
    model: str | Path | tuple[Any, Any],
    device_memory: str | int,
    frame: tuple[int, int],
    forward_tokens: int,
    **load: Any,
) -> tuple[Family, int]:
    """A model's adapter, and the bytes that a device's memory leaves for what all streams remember, beside weights and one pass.

    Args:
        model: as in `millpond.Session.from_pretrained`. frame: as in `plan_device`. forward_tokens: most tokens of a pass.
        load: the arguments of `millpond.models.load`; not for a loaded model.

    Raises:
        BudgetError: not even one stream would fit; names the minimum.
    """
    hold_nothing()
    weights: int | dict[int, int]
    if isinstance(model, tuple):
        bare = models.adapt(*model)
        weights = _weights(bare.model)
    else:
        sizes = {name: load[name] for name in ("dtype", "max_pixels") if name in load}
        bare = models.load(model, weights=False, **sizes)
        weights = weight_bytes(Path(model)) if is_quantized(model) else _weights(bare.model)
    grid, vision = bare.grid(*frame), bare.model.config.vision_config
    groups = max(1, ENCODED_AT_ONCE // grid.tokens)
    workspace = Workspace.of(
        bare.model.config,
        bare.geometry,
        block_tokens=max(forward_tokens, grid.tokens),
        patches=groups * bare.frames_per_group * (grid.height // vision.patch_size) * (grid.width // vision.patch_size),
    )
    minimum = minimum_budget(bare, grid, SessionConfig())
    workspace = replace(workspace, fixed=workspace.fixed + _HEAP)
    split = split_device(int(Budget(device_memory)), weights, bare.geometry, workspace, kv_minimum=minimum)
    return bare if isinstance(model, tuple) else models.load(model, bits=split.bits, **load), split.kv


def load_within(
    model: str | Path | tuple[Any, Any],
    device_memory: str | int | None,
    frame: tuple[int, int],
    config: SessionConfig,
    *,
    target_bits: float | None = None,
    **load: Any,
) -> tuple[Family, int | None]:
    """A model's adapter and, where a device's memory is given, the budget that the stream gets of it.

    Args:
        model: as in `millpond.Session.from_pretrained`. frame, config: as in `plan_device`.
        target_bits, load: the arguments of `millpond.models.load`; not for a loaded model.
    """
    if device_memory is not None:
        hold_nothing()
    if isinstance(model, tuple):
        if len(model) != 2:
            raise ModelError(f"a loaded model comes with its tokenizer or processor: 2 things, not {len(model)}")
        family = models.adapt(*model)
        kv = None if device_memory is None else plan_device(family, None, device_memory, frame, config).split.kv
        return family, kv
    if device_memory is None:
        return models.load(model, target_bits=target_bits, **load), None
    # Planned before any weight is read.
    bare = models.load(model, dtype=load["dtype"], max_pixels=load["max_pixels"], weights=False)
    split = plan_device(bare, model, device_memory, frame, config).split
    return models.load(model, bits=split.bits, target_bits=target_bits, **load), split.kv


def minimum_budget(family: Family, grid: Grid, config: SessionConfig) -> int:
    """The minimum budget in bytes with which a stream of such frames works."""
    minimum = 1
    for _ in range(2):  # for the prompt alone, then for frames
        try:
            _plan(family, grid, config, minimum)
        except BudgetError as error:
            if error.minimum is None:
                raise
            minimum = error.minimum
    return minimum


def default_budget(
    family: Family, config: SessionConfig, frame: tuple[int, int] = DEFAULT_FRAME, fps: float = _DEFAULT_FPS
) -> int:
    """A budget in bytes that suits a model where nobody names one: a minute of video in full detail, in whole MiB.

    At most half of the memory that is free, but never less than what works.

    Args:
        family: with or without its weights.
        frame: height and width of the largest frame, in pixels. fps: frames a second.
        config: of the stream; its budget counts for nothing here.

    Raises:
        BudgetError: not even the minimum that works would be free.
    """
    grid = family.grid(*frame)
    minimum = minimum_budget(family, grid, config)
    check_memory(minimum, family.device)
    there = available_memory(family.device)
    most = max(minimum, there // 2 if there is not None else minimum * 1024)

    def suits(budget: int) -> bool:
        return _plan(family, grid, config, budget).seconds_in_full(fps) >= _DEFAULT_SECONDS

    low, high = -(-minimum // _STEP), max(1, most // _STEP)  # the answer lies in (low, high], or is one of the ends
    if low >= high or not suits(high * _STEP):
        return max(minimum, min(most, high * _STEP))
    return bisect_left(range(high), True, low, key=lambda steps: suits(steps * _STEP)) * _STEP


def _plan(family: Family, grid: Grid, config: SessionConfig, budget: int) -> Plan:
    """How a stream's budget would be split; host memory, which has one of its own, is left out."""
    return Runner(family, replace(config, budget=budget, host_budget=None, host_path=None)).plan_for(grid)


def _weights(model: Any) -> int:
    """Bytes of all parameters, also of a model without weights; a tied head counts once."""
    # Some releases of transformers keep the flag in the outer config only, some in both.
    tied = any(getattr(one, "tie_word_embeddings", False) for one in (model.config, model.config.get_text_config()))
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    head = model.get_output_embeddings()
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        del tensors[id(head.weight)]  # without weights the two are not one yet
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
