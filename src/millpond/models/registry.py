"""From a name, a folder or a loaded model to its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from millpond import minnow
from millpond.errors import MillpondError, ModelError, first_line
from millpond.model_folder import check, check_size, load_whole, read_json, safely, without_weights
from millpond.models.base import Family
from millpond.models.llava_next_video import LlavaNextVideo
from millpond.models.llava_onevision import LlavaOnevision
from millpond.models.qwen2_5_vl import Qwen25VL
from millpond.models.qwen2_vl import Qwen2VL
from millpond.models.qwen3_vl import Qwen3VL
from millpond.plugins import Registered
from millpond.precision.folder import is_quantized
from millpond.precision.loading import load as load_quantized

_BUILT_IN: dict[str, type[Family]] = {
    kind: adapter
    for adapter in (Qwen2VL, Qwen25VL, Qwen3VL, LlavaOnevision, LlavaNextVideo)
    for kind in adapter.model_types
}
# Where a checkpoint keeps the numbers of its pixels, best first: file, and entry in it.
IMAGE_FILES = (
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
)
_SHIPPED = "minnow"
_AUTO = transformers.AutoModelForImageTextToText


@dataclass(frozen=True)
class Supported:
    """A model family that can be loaded: the `model_type` of its config, its name, and the adapter's class name."""

    model_type: str
    name: str
    adapter: str


class _Outside(Registered[Family]):
    """Adapters of other packages, by the `model_type` that each is for. A built-in one cannot be taken over: it is looked up first."""

    def __init__(self) -> None:
        super().__init__("millpond.models", Family, "model family", ModelError)  # type: ignore[type-abstract]

    def fault(self, loaded: type[Family], name: str) -> str | None:
        if name not in getattr(loaded, "model_types", ()):
            return "must have this in its class attribute `model_types`"
        if not getattr(loaded, "name", None):
            return "must have a class attribute `name`, for people"
        if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
            return f"must have a method {missing[0]!r}"
        return None


OUTSIDE = _Outside()


def supported() -> tuple[Supported, ...]:
    """Every model family that millpond can run: its own, then those of other packages that can be loaded."""
    adapters = _BUILT_IN | {kind: found for kind, found in OUTSIDE.loadable().items() if kind not in _BUILT_IN}
    return tuple(Supported(kind, adapter.name, adapter.__name__) for kind, adapter in adapters.items())


def adapt(model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> Family:
    """Wrap a loaded transformers model.

    Args:
        model: a `...ForConditionalGeneration` of a supported family.
        tokenizer: its tokenizer, or its processor.
        image: processor numbers, such as `{"max_pixels": 200_000}`; by default those of the processor, else the family's
            published ones.

    Raises:
        ModelError: not a loaded model and its tokenizer, not a supported family, or a chat template that shows no video.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ModelError(f"not a loaded transformers model: {type(model).__name__} {str(model)[:60]!r}")
    adapter = _adapter(model_type)
    if not hasattr(getattr(tokenizer, "tokenizer", tokenizer), "convert_ids_to_tokens"):
        raise ModelError(f"not a tokenizer or processor: {type(tokenizer).__name__} {str(tokenizer)[:60]!r}")
    if image is None:
        processor = getattr(tokenizer, "video_processor", None) or getattr(tokenizer, "image_processor", None)
        image = processor.to_dict() if processor is not None else {}
    model.eval()
    return adapter(model, tokenizer, image)


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    max_pixels: int | None = None,
    bits: int | None = None,
    target_bits: float | None = None,
    weights: bool = True,
) -> Family:
    """Load a model from a folder or by hub id and wrap it; a folder may be one that `millpond quantize` wrote.

    Args:
        name: a folder, a hub id, or "minnow", the model that ships with millpond.
        dtype: for example "bfloat16"; the checkpoint's own by default.
        device: CUDA where there is one by default.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; transformers' choice by default.
        max_pixels: most pixels of a frame after resizing, for families that take frames of any size.
        bits: for a quantized folder: read every linear at that many; by default as calibrated, else at the most.
        target_bits: for a calibrated folder: mean bits of a decoding step.
        weights: False leaves the weights away: the family can plan and lay out, but not run.

    Raises:
        ModelError: not found, not readable, not a supported family, a fixed frame size where `max_pixels` is given, or bits where
            nothing is quantized. PrecisionError: a quantized folder that is damaged or lacks such bits.
    """
    kind, target = _torch_dtype(dtype), _device(device)
    source = str(minnow.folder() if name == _SHIPPED else name)
    try:
        # Before transformers reads the config: a package may have to tell it of a `model_type` of its own.
        _registered(read_json(source, "config.json").get("model_type"))
        check(source)
        config = transformers.AutoConfig.from_pretrained(source, **safely(source))
    except MillpondError:
        raise
    except Exception as error:  # a stranger's file: what it makes the library do wrong has no end
        if Path(source).exists():
            raise ModelError(f"cannot read the model in {source!r}: {first_line(error)}") from error
        raise ModelError(
            f"no model at {source!r}: give a folder, or a hub id that is cached or can be reached: {first_line(error)}"
        ) from error
    adapter = _adapter(config.model_type)
    if max_pixels is not None and not adapter.any_size:
        raise ModelError(f"{config.model_type} resizes every frame to one size: max_pixels does not apply")
    quantized = is_quantized(source)
    if not quantized and (bits is not None or target_bits is not None):
        raise ModelError(f"{str(name)!r} is not quantized, so there are no bits to choose: see `millpond quantize`")
    if quantized and kind != "auto":
        raise ModelError(f"the dtype of a quantized model is that of the model it was made from: {str(name)!r}")
    try:
        if not weights:
            model = without_weights(_AUTO, config, kind)
        elif quantized:
            model = load_quantized(source, bits=bits, target_bits=target_bits, device=target)
            if attn_implementation:
                model.set_attn_implementation(attn_implementation)
        else:
            model = _complete(source, config, kind, attn_implementation)
        tokenizer, image = _tokenizer(source), _image_numbers(source, max_pixels)
        if weights:
            _move(model, target)
        return adapter(model.eval(), tokenizer, image)
    except MillpondError:
        raise
    except Exception as error:  # as above
        raise ModelError(f"cannot load the model at {str(name)!r}: {first_line(error)}") from error


def _device(name: str | None) -> str:
    """The device to run on.

    Raises:
        ModelError: there is none of that name, or it holds no numbers.
    """
    target = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(target).type
    except RuntimeError as error:
        raise ModelError(f"cannot move the model to {target!r}: {first_line(error)}") from error
    if kind == "meta":
        raise ModelError(f"cannot move the model to {target!r}: nothing can be computed there")
    return target


def _move(model: Any, target: str) -> None:
    try:
        model.to(target)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot move the model to {target!r}: {first_line(error)}") from error


def _complete(source: str, config: Any, dtype: str | torch.dtype, attention: str | None) -> Any:
    """The model with all its weights."""
    check_size(source, without_weights(_AUTO, config, dtype))
    return load_whole(_AUTO, source, dtype=dtype, **({"attn_implementation": attention} if attention else {}))


def _registered(model_type: Any) -> type[Family] | None:
    """The adapter for a `model_type`, imported; None where there is none.

    Raises:
        ModelError: the package that has one is broken.
    """
    if not isinstance(model_type, str):
        return None
    if model_type in _BUILT_IN:
        return _BUILT_IN[model_type]
    return OUTSIDE.load(model_type) if model_type in OUTSIDE.found else None


def _adapter(model_type: str) -> type[Family]:
    if adapter := _registered(model_type):
        return adapter
    known = ", ".join(row.model_type for row in supported())
    raise ModelError(f"the model family {model_type!r} is not supported; there are: {known}")


def _torch_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{dtype!r} is not a floating point type: use float32, bfloat16 or float16")
    return found


def _tokenizer(source: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safely(source))
    if not getattr(tokenizer, "chat_template", None):
        # Older checkpoints keep it in a JSON of its own.
        template = read_json(source, "chat_template.json").get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _image_numbers(source: str, max_pixels: int | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for file, entry in IMAGE_FILES:
        numbers = read_json(source, file)
        if entry is not None:
            numbers = numbers.get(entry) or {}
        if numbers:
            break
    if max_pixels is None:
        # What a file says is capped by the family, also where it does not name its processor.
        return {"image_processor_type": "unnamed", **numbers} if numbers else {}
    # What a user says is taken as it is.
    stays = {key: value for key, value in numbers.items() if key in ("image_mean", "image_std", "min_pixels")}
    return {**stays, "max_pixels": max_pixels}
