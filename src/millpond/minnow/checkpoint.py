"""Where the weights lie. Knows nothing about models, so that asking costs no import of torch."""

from pathlib import Path

from millpond.errors import ModelError

__all__ = ["folder"]


def folder() -> Path:
    """The folder with Minnow's config, weights and tokenizer, as transformers' `from_pretrained` takes it.

    Raises:
        ModelError: this installation has no weights.
    """
    path = Path(__file__).with_name("weights")
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            "this installation has no Minnow weights: install the wheel, or run `python -m millpond.minnow.train`"
        )
    return path
