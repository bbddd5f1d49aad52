"""What may be believed of a model's folder before anything is loaded from it, and how the model in it is built.

A checkpoint comes from a stranger: it may name code, pickles, other files, other repositories, or sizes that no machine has. None of
its code ever runs, nothing is asked on the terminal, a local folder never reaches for the network, and what it says about itself is
checked first. Knows files and numbers; nothing about model families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.utils import cached_file

from millpond.errors import ModelError

_INDEX = "model.safetensors.index.json"
_PARTS = ("text_config", "vision_config")
# The most that a config may say. Far above any model there is: what is larger is a mistake or an attack, and building it would end in
# no memory.
_MOST = {
    "num_hidden_layers": 512,
    "depth": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "num_heads": 1024,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 17,
    "embed_dim": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
    "image_size": 1 << 14,
    "patch_size": 1 << 12,
    "temporal_patch_size": 1 << 6,
    "spatial_merge_size": 1 << 6,
    "spatial_pool_stride": 1 << 6,
}


def safely(source: str | Path) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: no code of the checkpoint runs, nobody is asked, and a folder needs no network."""
    return {"trust_remote_code": False, "local_files_only": Path(source).is_dir()}


def check(source: str | Path) -> None:
    """Refuse a checkpoint whose own description asks for what must not be.

    Args:
        source: a folder or hub id. What cannot be found at all is left to whoever loads it.

    Raises:
        ModelError: it wants to run code, is an adapter of another model, names files outside itself or attention from elsewhere, or
            says sizes that cannot be. ValueError: a file is not JSON.
    """
    config = read_json(source, "config.json")
    kind = config.get("model_type")
    if "auto_map" in config and kind not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"the model type {kind!r} in {str(source)!r} comes with code of its own, which millpond never runs"
        )
    if read_json(source, "adapter_config.json"):
        raise ModelError(f"{str(source)!r} holds an adapter of another model: merge the two and give the result")
    for name, value in _kernels(config):
        if not (value is None or (isinstance(value, str) and value.isidentifier())):
            raise ModelError(f"config.json in {str(source)!r} asks for code from elsewhere: {name} {value!r}")
    files = [config.get("transformers_weights"), *_weights_of(source)]
    files += [name for key, name in read_json(source, "tokenizer_config.json").items() if key.endswith("_file")]
    for name in files:
        if name is not None and not _inside(name):
            raise ModelError(f"{str(source)!r} names a file outside itself: {name!r}")
    for part in _PARTS:
        if part in config and not isinstance(config[part], dict):
            raise ModelError(f"config.json in {str(source)!r} is incomplete: its {part} is {json.dumps(config[part])}")
    for part in (config, *(config[part] for part in _PARTS if part in config)):
        for name in part.keys() & _MOST.keys():
            number = part[name]
            if number is not None and not (type(number) is int and 0 < number <= _MOST[name]):
                raise ModelError(
                    f"config.json in {str(source)!r} says {name} {json.dumps(number)}: it must lie between 1 and {_MOST[name]}"
                )
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if heads and shared and heads % shared:
            raise ModelError(f"config.json in {str(source)!r} shares {shared} KV heads among {heads} heads")


def without_weights(auto: Any, config: Any, dtype: str | torch.dtype = "auto") -> Any:
    """The model of a config, in eval mode, without weights; its small buffers, such as the rotary frequencies, are real.

    Args:
        auto: a transformers auto class. dtype: "auto" for the config's own.
    """
    kind = getattr(config, "dtype", None) if dtype == "auto" else dtype
    with init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=kind or torch.float32, trust_remote_code=False).eval()


def load_whole(auto: Any, source: str, **options: Any) -> Any:
    """The model with all its weights, which must be safetensors (or a GGUF file).

    Args:
        auto: a transformers auto class. options: further arguments of its `from_pretrained`.

    Raises:
        ModelError: weights are missing.
    """
    model, report = auto.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **safely(source), **options
    )
    # transformers fills gaps with random numbers. LLaVA's towers may lack the layers behind the one whose features are used.
    if missing := sorted(key for key in report["missing_keys"] if "vision_tower" not in key):
        raise ModelError(
            f"cannot load the model at {source!r}: the weights are incomplete: {len(missing)} are missing, first {missing[0]}"
        )
    return model


def check_size(source: str | Path, empty: Any) -> None:
    """Refuse a folder whose config describes a model, given `without_weights`, of which its files hold far fewer weights.

    transformers makes up what is missing, and a part that the config leaves out becomes one of a default size: billions of weights.

    Raises:
        ModelError: it describes more than twice what it holds; 32 times where the files say that they pack several weights into one
            number. ValueError: a file is not safetensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    described = sum(weight.numel() for weight in empty.parameters())
    names = {*_weights_of(source)} or {"model.safetensors"}
    held = sum(_weights_in(folder / name) for name in names if (folder / name).exists())
    if held and described > (32 if read_json(source, "config.json").get("quantization_config") else 2) * held:
        raise ModelError(f"config.json in {str(source)!r} describes {described} weights, its files hold {held}")


def read_json(source: str | Path, file: str) -> dict[str, Any]:
    """The object in a checkpoint's file; empty where there is none.

    Raises:
        ValueError: not JSON, or not an object.
    """
    path = cached_file(
        str(source), file, local_files_only=Path(source).is_dir(), _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        return {}
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a valid JSON file: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} is not a JSON object")
    return read


def _weights_of(source: str | Path) -> list[Any]:
    """The files that an index of weights names."""
    index = read_json(source, _INDEX).get("weight_map", {})
    if not isinstance(index, dict):
        raise ValueError(f"{_INDEX} has no weight_map")
    return list(index.values())


def _weights_in(file: Path) -> int:
    """How many weights a safetensors file says it holds."""
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
    tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def _inside(name: Any) -> bool:
    """Whether that is the name of a file in the folder itself."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name and not {"\\", ":"} & set(name)


def _kernels(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a config and its parts say about who computes attention or experts: a plain name, or a repository that has it."""
    for name, value in config.items():
        if "attn_implementation" in name or "experts_implementation" in name:
            yield from ((name, one) for one in (value.values() if isinstance(value, dict) else [value]))
        elif isinstance(value, dict):
            yield from _kernels(value)
