"""Where the quantized linears of a decoder are: q, k, v, o, gate, up, down of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from millpond.errors import ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def decoder_of(model: Any) -> Any:
    """The stack of decoder layers: the language model inside a multimodal one, or the body of a text model.

    Raises:
        ModelError: the model has no layers with separate q, k, v, o, gate, up and down, or none with a norm before each half.
    """
    body = getattr(model, "model", model)
    body = getattr(body, "language_model", body)
    layers = getattr(body, "layers", None)
    if layers is None or not all(_is_plain(layer) for layer in layers):
        raise ModelError("only decoders with separate q, k, v, o, gate, up and down projections can be quantized")
    if not all(hasattr(layer, norm) for layer in layers for norm in NORMS):
        kind = type(layers[0]).__name__
        raise ModelError(
            f"{kind} cannot be quantized: bit-widths are decided from norms before attention and before the MLP"
        )
    return body


def _is_plain(layer: Any) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    return all(hasattr(attention, name) for name in ATTENTION) and all(hasattr(mlp, name) for name in MLP)


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of every quantized linear in the order in which a token meets them, such as `3.self_attn.q_proj`."""
    for index, layer in enumerate(decoder_of(model).layers):
        for half, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name in names:
                yield f"{index}.{half}.{name}", getattr(getattr(layer, half), name)


def replace(model: Any, name: str, module: nn.Module) -> None:
    """Put another module in the place of a linear."""
    index, half, leaf = name.split(".")
    setattr(getattr(decoder_of(model).layers[int(index)], half), leaf, module)


def effective_bits(model: Any) -> float:
    """Mean bit-width of all decoding steps so far, weighted by the size of the matrices: sum(count b N K) / sum(count N K)."""
    read = total = 0
    for _, linear in linears(model):
        for bits, count in linear.counts.items():
            read += count * bits * linear.size
            total += count * linear.size
    return read / total if total else 0.0
