"""`millpond quantize` and `millpond calibrate`: weights stored once, read at a precision chosen per layer and step. Options and files only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millpond.cli.options import DEFAULT_MODEL, QuietFlag
from millpond.errors import MillpondError, ModelError, PrecisionError, first_line
from millpond.memory.budget import format_bytes
from millpond.minnow import folder

if TYPE_CHECKING:
    from torch import Tensor

CalibrationText = Annotated[
    Path, typer.Option("--calibration", metavar="FILE", help="Plain text, of the kind that the model will read.")
]
Samples = Annotated[int, typer.Option(min=1, help="Runs of calibration text.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens in a run.")]


def quantize(
    model: Annotated[str, typer.Argument(help="minnow, a local folder, a hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an interrupted run in it is continued.")],
    calibration: CalibrationText,
    bits: Annotated[str, typer.Option(metavar="LOW-HIGH", help="Fewest and most bits that can be read.")] = "3-8",
    samples: Samples = 100,
    length: Length = 512,
    quiet: QuietFlag = False,
) -> None:
    """Store a model's decoder weights as nested bit planes, readable at every bit-width (Any-Precision)."""
    low, dash, high = bits.partition("-")
    if not (dash and low.isdigit() and high.isdigit()):
        raise typer.BadParameter(f"{bits!r} is not of the form 3-8", param_hint="--bits")
    from millpond.cli.watch import silence
    from millpond.precision.nested import check_bits
    from millpond.precision.quantize import quantize

    check_bits(int(low), int(high))  # before a model is loaded
    silence()
    where = str(folder()) if model == DEFAULT_MODEL else model
    loaded, tokenizer, dtype = _load(where)
    runs = _runs(tokenizer, calibration, samples, length)
    made = quantize(loaded, tokenizer, out, runs, source=model, bits=(int(low), int(high)), dtype=dtype, quiet=quiet)
    _copy_pixels(where, out)
    size = sum((out / name).stat().st_size for name in made.files)
    typer.echo(f"{out}: {made.layers} layers, {low} to {high} bits, {format_bytes(size)}")


def calibrate(
    folder: Annotated[Path, typer.Argument(help="What `millpond quantize` wrote.")],
    calibration: CalibrationText,
    target_bits: Annotated[
        list[float], typer.Option("--target-bits", metavar="BITS", help="Mean bits of a decoding step. Repeatable.")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of all weights together, for example 90MiB.")
    ] = None,
    samples: Samples = 24,
    length: Length = 256,
    quiet: QuietFlag = False,
) -> None:
    """Choose the bit-width of every layer, and how each decoding step picks between two (DP-LLM)."""
    from millpond.cli.watch import silence
    from millpond.precision.calibrate import calibrate
    from millpond.precision.folder import Description

    silence()
    Description.load(folder)  # a wrong folder is told before a tokenizer is looked for
    runs = _runs(_tokenizer(str(folder)), calibration, samples, length)
    made = calibrate(folder, runs, target_bits, memory=memory, quiet=quiet)
    mean = sum(made.max_bits.values()) / len(made.max_bits)
    targets = ", ".join(f"{target:g}" for target in sorted(made.targets))
    typer.echo(f"{folder}: targets of {targets} bits; at most {mean:.2f} bits a layer on average")


def _load(name: str) -> tuple[Any, Any, Any]:
    """A float32 model, its tokenizer, and the dtype of its checkpoint."""
    import torch
    import transformers

    from millpond.model_folder import check, check_size, load_whole, safely, without_weights

    path = Path(name)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if gguf else name
    try:
        check(source)
        config = transformers.AutoConfig.from_pretrained(source, **safely(source), **gguf)
        image = type(config) in transformers.AutoModelForImageTextToText._model_mapping
        auto = transformers.AutoModelForImageTextToText if image else transformers.AutoModelForCausalLM
        if not gguf:
            check_size(source, without_weights(auto, config))
        model = load_whole(auto, source, dtype=torch.float32, **gguf)
        return model.eval(), _tokenizer(source, **gguf), getattr(config, "dtype", None)
    except MillpondError:
        raise
    except Exception as error:  # a stranger's file: what it makes the library do wrong has no end
        raise ModelError(f"cannot load the model at {name!r}: {first_line(error)}") from error


def _copy_pixels(name: str, out: Path) -> None:
    """Put the numbers of a model's frames beside its quantized weights."""
    from transformers.utils import cached_file

    from millpond.models.registry import IMAGE_FILES

    for file in dict.fromkeys(file for file, _ in IMAGE_FILES):
        found = None if name.endswith(".gguf") else cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            (out / file).write_bytes(Path(found).read_bytes())


def _tokenizer(source: str, **gguf: str) -> Any:
    import transformers

    from millpond.model_folder import safely

    try:
        return transformers.AutoTokenizer.from_pretrained(source, **safely(source), **gguf)
    except Exception as error:  # as above
        raise ModelError(f"no tokenizer at {source!r}: {first_line(error)}") from error


def _runs(tokenizer: Any, file: Path, samples: int, length: int) -> Tensor:
    from millpond.precision.sensitivity import samples_of

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrecisionError(f"the calibration text {file} cannot be read: {error}") from error
    return samples_of(tokenizer, text, samples=samples, length=length)
