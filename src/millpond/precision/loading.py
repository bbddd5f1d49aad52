"""A quantized model from its folder: built without weights, then filled, so that the full-precision one never exists in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from millpond.errors import BudgetError, MillpondError, ModelError, PrecisionError
from millpond.memory.budget import format_bytes, parse_bytes
from millpond.memory.heap import give_back
from millpond.model_folder import check, safely, without_weights
from millpond.precision.calibration import Calibration
from millpond.precision.decoder import effective_bits, linears, replace
from millpond.precision.folder import Description, read_linears, read_rest
from millpond.precision.linear import NestedLinear
from millpond.precision.nested import NestedWeight
from millpond.precision.selection import select


def load(
    folder: str | Path,
    *,
    memory: str | int | None = None,
    target_bits: float | None = None,
    bits: int | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a model that `millpond quantize` wrote, as a transformers model whose linears read only the planes they need.

    The model gains `set_target_bits(bits)`, which switches to another calibrated target at once, reading no file, and
    `effective_bits()`, the mean bit-width of its decoding steps so far. Prompts run at the greatest bit-widths kept.

    Args:
        memory: bytes that all weights may take ("90MiB"); the calibration must have been made for no more.
        target_bits: a calibrated mean of bits a decoding step; by default the greatest bit-widths kept.
        bits: one bit-width for all linears, in place of a calibration.
        device: where the weights go.

    Raises:
        PrecisionError: not calibrated for this (also `copy.deepcopy` and `save_pretrained` of the model, which it cannot do), no such target or bit-width, or a damaged folder.
        BudgetError: the weights take more than `memory`; names the minimum that works.
    """
    path = Path(folder)
    description = Description.load(path)
    calibration = Calibration.load(path)
    if target_bits is not None and calibration is None:
        raise PrecisionError(
            f"{path} has not been calibrated: run `millpond calibrate {path} --target-bits {target_bits:g}`"
        )
    if bits is not None:
        low, high = description.bits
        if target_bits is not None:
            raise PrecisionError("give target_bits or bits, not both")
        if not low <= bits <= high:
            raise PrecisionError(f"{path} holds {low} to {high} bits, not {bits}")
        calibration = None

    def keep(name: str, weight: NestedWeight) -> NestedWeight:
        if bits is not None:
            return weight.kept(bits, {bits})
        return weight if calibration is None else weight.kept(calibration.max_bits[name], calibration.tables(name))

    model = assemble(path, description, keep)
    if memory is not None and (taken := stored_bytes(model)) > parse_bytes(memory):
        raise BudgetError(
            f"these weights take {taken} bytes ({format_bytes(taken)}), more than {memory}: "
            f"run `millpond calibrate {path} --memory {memory}`, or give at least that much",
            minimum=taken,
        )
    model.to(device)
    _give_targets(model, calibration, device)
    _refuse_copies(model, path)
    if target_bits is not None:
        model.set_target_bits(target_bits)
    return model


def assemble(path: Path, description: Description, keep: Callable[[str, NestedWeight], NestedWeight]) -> Any:
    """The model with what `keep` leaves of every linear; one linear at a time is whole in memory."""
    model = _empty(path)
    for name, tensor in read_rest(path, description).items():
        set_module_tensor_to_device(model, name, "cpu", value=tensor)
    for index in range(description.layers):
        for name, weight, bias, _ in read_linears(path, description, index):
            replace(model, name, NestedLinear(keep(name, weight), bias))
    model.tie_weights()
    give_back()  # the holes that dropped planes leave are resident otherwise
    return model.eval()


def stored_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each storage once, and of the estimators of every target."""
    tensors = [*model.parameters(), *model.buffers()]
    for choices in getattr(model, "precision_targets", {}).values():
        tensors += [choice.projection for choice in choices.values() if choice.projection is not None]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _empty(path: Path) -> Any:
    try:
        check(path)
        config = transformers.AutoConfig.from_pretrained(path, **safely(path))
    except MillpondError:
        raise
    except Exception as error:  # a stranger's file: what it makes the library do wrong has no end
        raise PrecisionError(f"{path} has no readable config: {' '.join(str(error).split())}") from error
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            model = without_weights(auto, config)
            for name, _ in linears(model):
                replace(model, name, nn.Identity())
            return model
    raise ModelError(f"the model type {config.model_type!r} is neither a causal nor an image-text model")


def _give_targets(model: Any, calibration: Calibration | None, device: str | torch.device) -> None:
    model.precision_targets = {
        bits: {name: choice.to(device) for name, choice in choices.items()}
        for bits, choices in (calibration.targets.items() if calibration else ())
    }
    model.precision_hooks = []
    model.set_target_bits = MethodType(_set_target_bits, model)
    model.effective_bits = MethodType(effective_bits, model)


def _refuse_copies(model: Any, path: Path) -> None:
    """A copy would share its decisions with the original; and what is loaded lacks the bits that were dropped."""

    def deepcopy(memo: Any) -> Any:
        raise PrecisionError(f"a quantized model cannot be copied: load {path} again")

    def save(*_: Any, **__: Any) -> None:
        raise PrecisionError(f"a quantized model holds no more than it reads and cannot be saved: copy {path}")

    model.__deepcopy__, model.save_pretrained = deepcopy, save


def _set_target_bits(model: Any, bits: float) -> None:
    """Switch every linear to a calibrated target.

    Raises:
        PrecisionError: not calibrated for that many bits; lists those that are.
    """
    choices = model.precision_targets.get(float(bits))
    if choices is None:
        known = ", ".join(f"{target:g}" for target in sorted(model.precision_targets)) or "none"
        raise PrecisionError(f"no target of {bits:g} bits is calibrated; there are: {known}")
    for hook in model.precision_hooks:
        hook.remove()
    model.precision_hooks = select(model, choices)
