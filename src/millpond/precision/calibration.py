"""What calibration decided, and where it is kept: greatest bit-widths, and for each target a pair, a threshold and an estimator per linear."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from millpond.errors import PrecisionError
from millpond.ops.width_choice import estimate
from millpond.precision.folder import digest, sealed, unsealed
from millpond.precision.tensor_file import read_tensors

_VERSION = 3
_JSON, _TENSORS = "calibration.json", "calibration.safetensors"


@dataclass(frozen=True, eq=False)
class Choice:
    """How one linear runs a decoding step for one target.

    Attributes:
        low, high: adjacent bit-widths, or equal ones.
        threshold: the high one is read where the estimate is above it; -inf for always, +inf for never.
        slope, intercept: of the linear estimate e = slope * ||x|| + intercept; unused with a projection.
        projection: bfloat16 [k, K], e = ||G x||; None for the linear estimate.
        early: the estimate reads the input that is known one sub-layer earlier, not the linear's own.
    """

    low: int
    high: int
    threshold: float = float("inf")
    slope: float = 0.0
    intercept: float = 0.0
    projection: Tensor | None = None
    early: bool = False

    def to(self, device: str | torch.device) -> Choice:
        """The same with its projection on a device."""
        return self if self.projection is None else replace(self, projection=self.projection.to(device))

    def estimate(self, x: Tensor) -> Tensor:
        """Estimates of ||(W_high - W_low) x|| for rows [T, K]: float32 [T]."""
        return estimate(x, self.projection, self.slope, self.intercept)


@dataclass(frozen=True, eq=False)
class Calibration:
    """All decisions for one model.

    Attributes:
        max_bits: greatest bit-width kept, by linear.
        targets: for each target in bits, a choice for every linear.
        memory: bytes of weights that these were chosen for; None without a limit.
    """

    max_bits: dict[str, int]
    targets: dict[float, dict[str, Choice]]
    memory: int | None = None

    def tables(self, name: str) -> set[int]:
        """Bit-widths whose tables some target, or the prompt, reads."""
        pairs = {bits for choices in self.targets.values() for bits in (choices[name].low, choices[name].high)}
        return pairs | {self.max_bits[name]}

    def save(self, folder: Path) -> None:
        """Write it beside the model."""
        tensors: dict[str, Tensor] = {}
        targets: dict[str, dict[str, dict[str, object]]] = {}
        for target, choices in self.targets.items():
            rows = targets.setdefault(str(target), {})
            for name, choice in choices.items():
                rows[name] = {key: value for key, value in vars(choice).items() if key != "projection"}
                if choice.projection is not None:
                    tensors[f"{target}/{name}"] = choice.projection.contiguous()
        save_file(tensors, folder / _TENSORS)
        written: dict[str, object] = {
            "version": _VERSION,
            "memory": self.memory,
            "widths": self.max_bits,
            "targets": targets,
            "sha256": digest(folder / _TENSORS),
        }
        (folder / _JSON).write_text(sealed(written), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """Read it; None where the model has not been calibrated.

        Raises:
            PrecisionError: damaged, altered, or of another version.
        """
        path = folder / _JSON
        if not path.exists():
            return None
        again = f"run `millpond calibrate {folder}` again"
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["version"] != _VERSION:
                raise PrecisionError(f"{path} is of format {read['version']}, not {_VERSION}: {again}")
            read = unsealed(read)
            if digest(folder / _TENSORS) != read["sha256"]:
                raise PrecisionError(f"{folder / _TENSORS} is not the file that was written: {again}")
            tensors = read_tensors(folder / _TENSORS)
            targets = {
                float(target): {
                    name: Choice(**row, projection=tensors.get(f"{float(target)}/{name}")) for name, row in rows.items()
                }
                for target, rows in read["targets"].items()
            }
            return cls({name: int(bits) for name, bits in read["widths"].items()}, targets, read["memory"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrecisionError(f"{path} cannot be read ({error}): {again}") from error
