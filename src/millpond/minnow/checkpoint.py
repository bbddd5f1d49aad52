"""Where the weights lie and what they were trained to answer. Knows nothing about models, so that asking costs no import of torch."""

from pathlib import Path

from millpond.errors import ModelError

SUPPORTED = ("colour", "object", "where", "appear", "digit", "first", "last", "now")
"""The questions of `millpond.eval.streams` that Minnow is trained on and ships for."""


def folder() -> Path:
    """The folder with Minnow's config, weights and tokenizer, as transformers' `from_pretrained` takes it.

    Raises:
        ModelError: this installation has no weights.
    """
    path = Path(__file__).with_name("weights")
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            "this installation has no Minnow weights: install the wheel, or train them from a source checkout (training/minnow)"
        )
    return path
