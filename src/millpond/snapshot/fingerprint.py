"""Which model a snapshot belongs to: what its config says, a sample of every weight, how it reads text and frames."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from millpond.errors import SnapshotError, SourceError
from millpond.models.base import Family
from millpond.precision.linear import NestedLinear
from millpond.printable import printable
from millpond.snapshot.plain import to_values

_SAMPLES = 64  # numbers of each weight
_SIZES = ((64, 64), (360, 640), (1080, 1920), (2160, 3840))
_TEXT = "What is there now, and what was there before?"
# Of a config: who wrote it, and how it is run; no part of what the model computes. The dtype is told by itself.
_NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "use_cache")


def fingerprint(family: Family) -> dict[str, Any]:
    """A model in plain values: equal for equal models, whatever device they are on and however their attention is computed."""
    geometry = family.geometry
    text = hashlib.sha256(repr([family.opening(), family.reopening(), sorted(family.stop_ids)]).encode())
    text.update(_bytes(family.question(_TEXT, after_video=True).embeds))
    return {
        "family": family.name,
        "dtype": str(geometry.dtype).removeprefix("torch."),
        "cache": {**to_values(geometry), "dtype": "", "hidden": family.hidden, "limit": family.rope.limit},
        "config": _plain(family.model.config.to_dict()),
        "weights": _weights(family),
        "text": text.hexdigest(),
        "frames": list(_frames(family)),
    }


def compare(name: str, saved: Any, family: Family) -> None:
    """Hold a model to the one that a session was saved with.

    Args:
        name: of the file. saved: what `fingerprint` gave then.

    Raises:
        SnapshotError: it is another; says what differs.
    """
    here = fingerprint(family)
    if not isinstance(saved, dict) or set(saved) != set(here):
        raise SnapshotError(f"{name} does not say which model it belongs to")
    for what in ("family", "dtype"):
        if saved[what] != here[what]:
            raise SnapshotError(f"{name} was saved with a {what} {saved[what]!r}, and this model's is {here[what]!r}")
    for what in ("cache", "config"):
        if difference := _difference(saved[what], here[what]):
            raise SnapshotError(f"{name} was saved with another model: {difference}")
    told = {
        "weights": "its weights differ",
        "text": "it reads text differently",
        "frames": "it resizes frames differently",
    }
    for what, how in told.items():
        if saved[what] != here[what]:
            raise SnapshotError(f"{name} was saved with another model than this one: {how}")


def _difference(saved: Any, here: Any, path: str = "") -> str | None:
    """The first entry that both have and that differs, in words; a release of transformers may add some or leave some out."""
    if not (isinstance(saved, dict) and isinstance(here, dict)):
        was, now = (printable(str(value)[:60]) for value in (saved, here))
        return None if saved == here else f"{path} was {was}, and is {now} here"
    for key in sorted(saved.keys() & here.keys()):
        if found := _difference(saved[key], here[key], f"{path}.{key}".lstrip(".")):
            return found
    return None


def _plain(value: Any) -> Any:
    """A config's values as JSON gives them back."""
    if isinstance(value, dict):
        named = {str(key): one for key, one in value.items()}
        return {key: _plain(one) for key, one in named.items() if key[:1] != "_" and key not in _NOT_THE_MODEL}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, bool | int | float | str | None) else str(value)


def _weights(family: Family) -> str:
    """A checksum over evenly spread numbers of every weight, and all of a small one."""
    digest = hashlib.sha256()
    model: torch.nn.Module = family.model
    for name, module in model.named_modules():
        if isinstance(module, NestedLinear):
            digest.update(f"{name} {module.low} {module.high} {module.choose is None}".encode())
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach()
        flat = flat.view(-1) if flat.is_contiguous() else flat.reshape(-1)
        step = max(1, len(flat) // _SAMPLES)
        samples.setdefault((flat.device, flat.dtype), []).append(flat[::step][: 2 * _SAMPLES])
    for parts in samples.values():  # one transfer a device and dtype
        digest.update(_bytes(torch.cat(parts)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _frames(family: Family) -> Iterator[list[int] | None]:
    """What frames of several sizes become; None for one that the model refuses."""
    for height, width in _SIZES:
        try:
            yield list(to_values(family.grid(height, width)).values())
        except SourceError:
            yield None
