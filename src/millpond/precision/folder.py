"""A quantized model on disk: planes and tables as safetensors, one file a decoder layer, the rest beside them, and a description.

`millpond_precision.json` names every file with its SHA-256, so that what is damaged, altered or of another version is refused in one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from millpond.errors import PrecisionError
from millpond.precision.nested import NestedWeight
from millpond.precision.tensor_file import header_of, read_tensors

DESCRIPTION = "millpond_precision.json"
_VERSION = 2
_REST = "rest.safetensors"


@dataclass
class Description:
    """What a folder holds.

    Attributes:
        source: name of the model that was quantized.
        bits: smallest and greatest bit-width stored.
        layers: decoder layers.
        columns: K of every linear, by name.
        files: SHA-256 of every file, by name.
        version: of the format.
    """

    source: str
    bits: tuple[int, int]
    layers: int
    columns: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    version: int = _VERSION

    def save(self, folder: Path) -> None:
        """Write the description; the last thing that is written, so that its presence means a whole model."""
        stored = asdict(self)
        stored["widths"] = stored.pop("bits")  # as the format calls it
        (folder / DESCRIPTION).write_text(sealed(stored), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Read it.

        Raises:
            PrecisionError: there is none, or it is of another version.
        """
        path = folder / DESCRIPTION
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PrecisionError(f"{folder} holds no quantized model: run `millpond quantize MODEL {folder}`") from None
        except (OSError, ValueError) as error:
            raise PrecisionError(f"{path} cannot be read: {error}") from error
        if not isinstance(read, dict) or read.get("version") != _VERSION:
            version = read.get("version") if isinstance(read, dict) else None
            raise PrecisionError(
                f"{folder} is of format {version}; this millpond reads format {_VERSION}: quantize again"
            )
        try:
            fields = unsealed(read)
            low, high = (int(bits) for bits in fields.pop("widths"))
            found = cls(**fields, bits=(low, high))
            columns = {str(name): int(count) for name, count in found.columns.items()}
            files = {str(name): str(sha) for name, sha in found.files.items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise PrecisionError(f"{path} is not a description of a quantized model: {error}") from error
        found.columns, found.files = columns, files
        found.check(folder, "config.json")
        return found

    def check(self, folder: Path, name: str) -> Path:
        """The path of a file that is the one that was written.

        Raises:
            PrecisionError: it is missing, truncated or altered.
        """
        path = folder / name
        if not path.exists():
            raise PrecisionError(f"{folder} lacks {name}: quantize again")
        if digest(path) != self.files.get(name):
            raise PrecisionError(f"{path} is not the file that was written: it is truncated or altered")
        return path


def sealed(fields: dict[str, object]) -> str:
    """JSON with the SHA-256 of its own content, so that a number that was edited is not read as one that was measured."""
    return json.dumps({**fields, "seal": _seal(fields)}, indent=1) + "\n"


def unsealed(read: dict[str, Any]) -> dict[str, Any]:
    """The fields that `sealed` wrote.

    Raises:
        ValueError: they are others.
    """
    fields = {key: value for key, value in read.items() if key != "seal"}
    if read.get("seal") != _seal(fields):
        raise ValueError("it has been edited since it was written")
    return fields


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_quantized(folder: str | Path) -> bool:
    """Whether `millpond quantize` wrote there."""
    return (Path(folder) / DESCRIPTION).exists()


def layer_file(index: int) -> str:
    """Name of a decoder layer's file."""
    return f"layer-{index:03d}.safetensors"


def write_layer(
    folder: Path, index: int, weights: dict[str, NestedWeight], biases: dict[str, Tensor], errors: dict[str, Tensor]
) -> None:
    """Write one decoder layer; names are those of `millpond.precision.decoder.linears`, errors as `read_linears` gives them."""
    tensors = {f"{name}.bias": bias for name, bias in biases.items()} | {
        f"{name}.errors": e for name, e in errors.items()
    }
    for name, weight in weights.items():
        tensors[f"{name}.planes"] = weight.planes
        tensors |= {f"{name}.table.{bits}": table for bits, table in weight.tables.items()}
    _save(tensors, folder / layer_file(index))


def write_rest(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what is not quantized: embeddings, norms, head, vision tower, buffers."""
    _save(tensors, folder / _REST)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)  # a file that is there is whole


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_linears(
    folder: Path, description: Description, index: int
) -> Iterator[tuple[str, NestedWeight, Tensor | None, Tensor]]:
    """Name, weight, bias and errors of every linear of a layer, one at a time: only one is whole in memory.

    Errors are float64 [2, bit-widths], what each bit-width costs: first and second order, see `millpond.precision.quantize`.

    Raises:
        PrecisionError: the file is missing or not the one that was written.
    """
    path = description.check(folder, layer_file(index))
    stored = header_of(path)
    for name in [key.removesuffix(".planes") for key in stored if key.endswith(".planes")]:
        if name not in description.columns:
            raise PrecisionError(f"the description of {folder} does not know {name}: quantize again")
        own = read_tensors(path, [key for key in stored if key.startswith(f"{name}.")])
        tables = {int(key.rpartition(".")[2]): table for key, table in own.items() if key.startswith(f"{name}.table.")}
        weight = NestedWeight(own[f"{name}.planes"], tables, description.columns[name])
        yield name, weight, own.get(f"{name}.bias"), own[f"{name}.errors"]


def read_rest(folder: Path, description: Description) -> dict[str, Tensor]:
    """What is not quantized.

    Raises:
        PrecisionError: as for a layer.
    """
    return read_tensors(description.check(folder, _REST))


def is_whole(path: Path) -> bool:
    """Whether a shard that an interrupted run left can be used."""
    try:
        header_of(path)
    except PrecisionError:
        return False
    return True
