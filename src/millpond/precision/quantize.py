"""From a transformers model to a folder of nested weights. Resumable: a layer that is on disk is not done again."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from millpond.errors import PrecisionError
from millpond.precision.decoder import linears
from millpond.precision.folder import DESCRIPTION, Description, digest, is_whole, layer_file, write_layer, write_rest
from millpond.precision.nested import NestedWeight, check_bits, nest
from millpond.precision.sensitivity import STATE, Sensitivity, sensitivities

RUN = "unfinished.json"
"""What a run that has not ended works on."""


def quantize(
    model: Any,
    tokenizer: Any,
    out: Path,
    samples: Tensor,
    *,
    source: str,
    bits: tuple[int, int] = (3, 8),
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Description:
    """Write a model's decoder linears as nested bit planes into a folder, everything else as it is.

    Args:
        model: a transformers causal or image-text model, float32 or bfloat16.
        tokenizer: its tokenizer or processor; saved beside it.
        samples: int64 [S, T] of calibration text (`millpond.precision.sensitivity.samples_of`).
        source: the model's name, for the description.
        bits: smallest and greatest bit-width.
        dtype: in which everything else is stored, and the model runs when it is loaded; by default the model's own. Sensitivities are
            surer in float32 than in the dtype of most checkpoints, so a model may be given in more than is to be kept.

    Raises:
        ModelError: not a decoder that can be quantized. PrecisionError: bit-widths that cannot be.
    """
    low, high = bits
    check_bits(low, high)
    named = dict(linears(model))
    if (out / DESCRIPTION).exists():
        raise PrecisionError(f"{out} holds a quantized model already: choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    layers = 1 + max(int(name.split(".")[0]) for name in named)
    text = hashlib.sha256(samples.cpu().numpy().tobytes()).hexdigest()
    run: dict[str, object] = {
        "source": source,
        "widths": list(bits),
        "weights": _print_of(named),
        "text": text,
        "dtype": str(dtype),
    }
    _claim(out, run)
    todo = [index for index in range(layers) if not is_whole(out / layer_file(index))]
    if todo:
        # From the last layer to the first, so that a run that was cut off has the first ones before it.
        with tqdm(total=len(todo), desc="quantizing", unit="layer", disable=quiet) as bar:
            for found in sensitivities(model, samples, out, first=max(todo), quiet=quiet):
                own = {name: named[name] for name in found.square}
                weights = {
                    name: nest(part.weight, found.square[name], low=low, high=high) for name, part in own.items()
                }
                errors = {name: _errors(weights[name], part.weight, found, name) for name, part in own.items()}
                biases = {name: _as(part.bias, dtype) for name, part in own.items() if part.bias is not None}
                write_layer(out, found.index, weights, biases, errors)
                bar.update()
    replaced = {id(parameter) for linear in named.values() for parameter in linear.parameters()}
    stored = model.state_dict().keys()  # not every buffer is
    rest = {name: tensor for name, tensor in model.named_parameters() if id(tensor) not in replaced}
    rest |= {name: tensor for name, tensor in model.named_buffers() if name in stored}
    write_rest(out, {name: _as(tensor, dtype) for name, tensor in rest.items()})
    config = copy.deepcopy(model.config)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for left in (RUN, STATE):
        (out / left).unlink(missing_ok=True)
    description = Description(
        source=source,
        bits=bits,
        layers=layers,
        columns={name: linear.in_features for name, linear in named.items()},
        files={path.name: digest(path) for path in [*sorted(out.glob("*.safetensors")), out / "config.json"]},
    )
    description.save(out)
    return description


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _claim(out: Path, run: dict[str, object]) -> None:
    """A run that was cut off is taken up only with the same model, text and bit-widths."""
    path = out / RUN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != run:
            raise PrecisionError(f"{out} holds the beginning of another run: choose another folder, or remove it")
    elif any(out.glob("*.safetensors")):
        raise PrecisionError(f"{out} holds other files: choose another folder")
    else:
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _print_of(named: dict[str, Any]) -> str:
    """Tells one model's weights from another's: shapes, and a few rows of every linear."""
    found = hashlib.sha256()
    for name, linear in named.items():
        found.update(f"{name}{tuple(linear.weight.shape)}".encode())
        found.update(linear.weight.detach()[:2].float().cpu().numpy().tobytes())
    return found.hexdigest()


def _errors(nested: NestedWeight, weight: Tensor, found: Sensitivity, name: str) -> Tensor:
    """What each bit-width costs by the two expansions of the loss, float64 [2, bit-widths]: |sum g dW| and sum g^2 dW^2.

    The first is LLM-MQ's, the second that of Any-Precision and HAWQ-V2 with the Fisher diagonal in place of the Hessian.
    """
    rows = []
    for bits in sorted(nested.tables):
        change = nested.dense(bits) - weight.detach().float()
        first = (found.gradient[name] * change).sum(dtype=torch.float64).abs() / found.samples
        second = (found.square[name] * change.square()).sum(dtype=torch.float64) / found.samples
        rows.append(torch.stack([first, second]))
    return torch.stack(rows, dim=1)
