"""The one budget: a device's memory, split between the weights, the stream's memory and the workspace of a forward pass.

    weights + kv + workspace(kv) <= device

What is above the minimum of each side is shared: half to the weights, until all of their bits are read, the rest to the stream.
Reads configs and the headers of files, never a weight; the stream's own split is `millpond.cache.plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millpond.errors import BudgetError
from millpond.memory.budget import format_bytes
from millpond.memory.geometry import Geometry
from millpond.precision.allocate import linear_bytes
from millpond.precision.calibration import Calibration
from millpond.precision.folder import Description
from millpond.precision.tensor_file import header_of

_FLOAT = 4
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Workspace:
    """Bytes that a forward pass takes beside weights and stream: `fixed`, and `per_slot` for each token slot of the stream.

    Counted from above for attention that copies one layer's keys and values, repeated for each query head, and for a product that
    works in float32. `tests/precision/test_device_budget.py` compares it with what torch's allocator reports.
    """

    fixed: int
    per_slot: int

    @classmethod
    def of(cls, config: Any, geometry: Geometry, *, block_tokens: int, patches: int = 0) -> Workspace:
        """Read it from a transformers config.

        Args:
            block_tokens: tokens that run through the decoder at once.
            patches: patches that run through the vision tower at once.
        """
        text = config.get_text_config()
        hidden, inner = text.hidden_size, text.intermediate_size
        item, heads = geometry.dtype.itemsize, geometry.kv_heads * geometry.kv_groups
        rows = block_tokens * item * (6 * hidden + 3 * inner + 4 * heads * geometry.head_dim)
        product = _FLOAT * (block_tokens * (hidden + inner) + _ROWS_AT_ONCE * max(hidden, inner))
        mask = block_tokens * (item + 1)  # in the model's dtype and as booleans; fused attention keeps no scores
        copies = 2 * heads * geometry.head_dim * item
        fixed = rows + product + 2 * _FLOAT * text.vocab_size
        vision = getattr(config, "vision_config", None)
        if vision is not None and patches:
            wide = getattr(vision, "hidden_size", None) or getattr(vision, "embed_dim", hidden)
            deep = getattr(vision, "intermediate_size", None) or int(wide * getattr(vision, "mlp_ratio", 4))
            each = wide * 10 + deep * 3 + 2 * 3 * getattr(vision, "patch_size", 14) ** 2
            fixed = max(fixed, patches * item * each) + block_tokens * hidden * item
        return cls(fixed, copies + mask)


@dataclass(frozen=True)
class DeviceSplit:
    """A device's memory, split.

    Attributes:
        device: all of it, in bytes.
        weights: bytes that the weights may take: what `calibrate` and `load` are given as `memory`.
        bits: the greatest bit-width that fits them, the same for every linear; None where a calibration decides.
        kv: bytes for the stream: a session's `budget`.
        workspace: bytes for a forward pass.
        slots: token slots that `kv` can hold at most.
    """

    device: int
    weights: int
    bits: int | None
    kv: int
    workspace: int
    slots: int

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for `--json`."""
        return asdict(self)


def split_device(
    device: int, weights: int | Mapping[int, int], geometry: Geometry, workspace: Workspace, *, kv_minimum: int
) -> DeviceSplit:
    """Split `device` bytes.

    Args:
        weights: bytes of the weights: one number where they are fixed (a plain model, a calibrated one), or a number for each bit-width.
        kv_minimum: the minimum budget of a session (`BudgetError.minimum` of a plan).

    Raises:
        BudgetError: not even the minimum of everything fits; names it.
    """
    choices: list[tuple[int | None, int]] = [(None, weights)] if isinstance(weights, int) else [*weights.items()]
    sizes = [size for _, size in choices]
    lightest, heaviest = min(sizes), max(sizes)
    each, beside = geometry.bytes_per_token, workspace.per_slot
    minimum_kv = kv_minimum + workspace.fixed + beside * -(-kv_minimum // each)
    minimum = lightest + minimum_kv
    if device < minimum:
        raise BudgetError(
            f"{format_bytes(device)} are too few for this model and stream: the minimum that works is {minimum} bytes "
            f"({format_bytes(minimum)}: weights {format_bytes(lightest)}, stream {format_bytes(kv_minimum)}, "
            f"workspace {format_bytes(minimum_kv - kv_minimum)})",
            minimum=minimum,
        )
    allowed = lightest + min((device - minimum) // 2, heaviest - lightest)
    bits, taken = max((choice for choice in choices if choice[1] <= allowed), key=lambda choice: choice[1])
    # kv + fixed + per_slot * slots = what is left, with slots = kv / each rounded up.
    left = device - taken - workspace.fixed
    slots = left // (each + beside)
    kv = max(kv_minimum, min(left - beside * slots, slots * each))
    return DeviceSplit(device, taken, bits, kv, device - taken - kv, kv // each)


def weight_bytes(folder: Path) -> int | dict[int, int]:
    """Bytes that a quantized model takes once loaded, from the headers of its files alone.

    Returns:
        For a calibrated folder one number, otherwise a number for each bit-width at which all linears could be read.

    Raises:
        PrecisionError: no quantized model, or a file that is cut.
    """
    description = Description.load(folder)
    low, high = description.bits
    rest = sum(entry.nbytes for entry in header_of(folder / "rest.safetensors").values())
    shapes: dict[str, int] = {}
    for name in description.files:
        if name.startswith("layer-"):
            for key, entry in header_of(folder / name).items():
                linear, _, what = key.rpartition(".")
                if what == "planes":
                    shapes[linear] = entry.shape[0]
                elif what == "bias":
                    rest += entry.nbytes
    made = Calibration.load(folder)
    if made is None:
        return {
            bits: rest
            + sum(linear_bytes(rows, description.columns[name], bits, (bits,)) for name, rows in shapes.items())
            for bits in range(low, high + 1)
        }
    estimators = [choice.projection for choices in made.targets.values() for choice in choices.values()]
    return (
        rest
        + sum(tensor.nbytes for tensor in estimators if tensor is not None)
        + sum(
            linear_bytes(rows, description.columns[name], made.max_bits[name], sorted(made.tables(name)))
            for name, rows in shapes.items()
        )
    )
