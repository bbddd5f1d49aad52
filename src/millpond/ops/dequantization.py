"""Dequantizing keys and values that are stored in 2, 3, 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_DEQUANTIZE = CFunction("dequantization.cpp", "dequantize", "ppnnnnnnp", by_dtype=True)


@operation
def dequantize(
    codes: Tensor, scales: Tensor, bits: int, by_channel: bool, out: Tensor, step: int | None = None
) -> None:
    """Dequantize keys or values: code * step + minimum.

    Args:
        codes: uint8 [m, G, R], m groups of G tokens, each token's codes packed into R bytes.
        scales: float16 [m, 2, D] where a channel of G tokens shares a step and a minimum (`by_channel`: keys), [m, G, 2, C] where G
            channels of a token do (values).
        out: [m * G, D], a floating dtype, written.
        step: tokens read at a time where there is no kernel, whole groups; None for all.
    """
    size = codes.shape[1]
    groups = max(1, (step or len(out)) // size)
    parts = codes.split(groups), scales.split(groups), out.split(groups * size)
    for packed, scale, rows in zip(*parts, strict=True):
        floats = unpack_codes(packed, bits, rows.shape[1])
        if by_channel:
            floats.mul_(scale[:, :1]).add_(scale[:, 1:])
        else:
            for index, channels in enumerate(floats.split(size, dim=2)):
                channels.mul_(scale[:, :, 0, index, None]).add_(scale[:, :, 1, index, None])
        rows.copy_(floats.view(rows.shape))


@dequantize.kernel("cpu")
def _dequantize(
    codes: Tensor, scales: Tensor, bits: int, by_channel: bool, out: Tensor, step: int | None = None
) -> Declined | None:
    run = _C_DEQUANTIZE.of(out.dtype)
    if run is None or not contiguous(codes, scales, out):
        return DECLINED
    run(codes.data_ptr(), scales.data_ptr(), bits, by_channel, *codes.shape, out.shape[1], out.data_ptr())
    return None


def code_word(bits: int) -> tuple[int, int]:
    """Codes in a word, and the word's bytes: the fewest whole bytes that whole codes fill."""
    return (8, 3) if bits == 3 else (8 // bits, 1)


def unpack_codes(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Codes of `bits` bits, uint8 [..., R] with the first code in a word's lowest bits, as float32 [..., head_dim]."""
    values, size = code_word(bits)
    if size == 1:
        words = packed
    else:
        words = packed[..., ::size].to(torch.int32)
        for byte in range(1, size):
            words.bitwise_or_(packed[..., byte::size].to(torch.int32) << (8 * byte))
    floats = torch.empty(*packed.shape[:-1], head_dim, device=packed.device)
    for index in range(values):
        part = floats[..., index::values]
        part.copy_((words[..., : part.shape[-1]] >> (bits * index)) & (2**bits - 1))
    return floats
