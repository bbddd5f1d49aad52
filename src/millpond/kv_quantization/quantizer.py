"""Keys and values in 2, 3, 4 or 8 bits: asymmetric uniform quantization as in KIVI (Liu et al., ICML 2024, section 3.2).

Keys have a few channels of large values, so they are quantized per channel, in groups of G tokens; values have no such
channels and are quantized per token, in groups of G channels. Written from the paper's formulas; its residual window is the
caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millpond import ops
from millpond.errors import PolicyError
from millpond.ops.dequantization import code_word

BITS = (2, 3, 4, 8)
# Of steps and minima: 11 significant bits, where bfloat16's 8 would cost more than 8-bit codes gain.
_SCALE = torch.float16


@dataclass(frozen=True)
class KVQuantizer:
    """How one head's keys and values are written down.

    A group with minimum m and maximum M has the step s = (M - m) / (2^bits - 1); x becomes q = round((x - m) / s) and is read as
    q s + m (KIVI, section 2). s and m are rounded to float16 first and q is fitted to the rounded ones, so that an error is at
    most s / 2, or what the roundings cut off at the group's ends. Writing never fails, because it happens while a cache is half
    moved: what lies outside float16's range becomes its end, and what is not a number becomes 0.

    Attributes:
        bits: of a code, one of `BITS`.
        group: G, tokens that share a key channel's step and minimum, and channels that share a value's.

    Raises:
        PolicyError: another number of bits, or groups of less than one.
    """

    bits: int
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise PolicyError(f"keys and values can be stored in {', '.join(map(str, BITS))} bits, not in {self.bits}")
        if self.group < 1:
            raise PolicyError(f"a group needs at least one member, not {self.group}")

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one key or value vector of `head_dim` components."""
        values, size = code_word(self.bits)
        return -(-head_dim // values) * size

    def value_groups(self, head_dim: int) -> int:
        """Groups that a value vector is cut into; the last may be shorter."""
        return -(-head_dim // self.group)

    def group_bytes(self, head_dim: int) -> int:
        """Bytes of G tokens of one KV head, keys and values: codes, steps and minima."""
        scales = 2 * _SCALE.itemsize * (head_dim + self.group * self.value_groups(head_dim))
        return 2 * self.group * self.row_bytes(head_dim) + scales

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token of one KV head, its share of the group's steps and minima included."""
        return self.group_bytes(head_dim) / self.group

    def scratch_bytes(self, tokens: int, head_dim: int) -> int:
        """The most that encoding or decoding `tokens` tokens of one head allocates, in bytes."""
        # Two float32 copies, codes and their words (int32 where a word is wider than a byte), and the groups' bounds.
        values, size = code_word(self.bits)
        padded = -(-head_dim // values) * values
        words = padded // values * (2 if size == 1 else 2 * 4 + 2 * 8)
        bounds = max(-(-tokens // self.group) * head_dim, tokens) * (4 * 4 + 2 * 2 + 2)
        return tokens * (2 * 4 * padded + 3 * padded + words) + bounds

    def new_keys(
        self, shape: tuple[int, ...], groups: int, head_dim: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Storage for `groups` groups of keys: codes uint8 [*shape, groups, G, R], scales float16 [*shape, groups, 2, D]."""
        codes = torch.zeros(*shape, groups, self.group, self.row_bytes(head_dim), dtype=torch.uint8, device=device)
        return codes, torch.zeros(*shape, groups, 2, head_dim, dtype=_SCALE, device=device)

    def quantize_keys(self, keys: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Write m groups of keys.

        Args:
            keys: [m * G, D], a floating dtype.
            codes: uint8 [m, G, R], written. scales: float16 [m, 2, D], steps and minima, written.
        """
        floats = _finite(keys).view(-1, self.group, keys.shape[1])
        step, low = self._bounds(floats, 1)
        scales[:, 0], scales[:, 1] = step, low
        self._write_words(self._quantize(floats, step[:, None], low[:, None]), codes)

    def dequantize_keys(self, codes: Tensor, scales: Tensor, out: Tensor, step: int | None = None) -> None:
        """Read m groups of keys back into `out`, [m * G, D], `step` tokens at a time; the arguments of `quantize_keys`."""
        ops.dequantize(codes, scales, self.bits, True, out, step)

    def new_values(
        self, shape: tuple[int, ...], groups: int, head_dim: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Storage for `groups` times G values: codes uint8 [*shape, groups, G, R], scales float16 [*shape, groups, G, 2, C]."""
        codes = torch.zeros(*shape, groups, self.group, self.row_bytes(head_dim), dtype=torch.uint8, device=device)
        scales = torch.zeros(*shape, groups, self.group, 2, self.value_groups(head_dim), dtype=_SCALE, device=device)
        return codes, scales

    def quantize_values(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Write values.

        Args:
            values: [m * G, D], a floating dtype.
            codes: uint8 [m, G, R], written. scales: float16 [m, G, 2, C], steps and minima of C channel groups, written.
        """
        floats = _finite(values).view(-1, self.group, values.shape[1])
        for index, part in enumerate(floats.split(self.group, dim=2)):
            step, low = self._bounds(part, 2)
            scales[:, :, 0, index], scales[:, :, 1, index] = step, low
            self._quantize(part, step[:, :, None], low[:, :, None])
        self._write_words(floats, codes)

    def dequantize_values(self, codes: Tensor, scales: Tensor, out: Tensor, step: int | None = None) -> None:
        """Read values back into `out`, [m * G, D], `step` tokens at a time; the arguments of `quantize_values`."""
        ops.dequantize(codes, scales, self.bits, False, out, step)

    def _bounds(self, floats: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """float16 step and minimum of each group."""
        low, high = floats.aminmax(dim=axis)
        return ((high - low) / (2**self.bits - 1)).to(_SCALE), low.to(_SCALE)

    def _quantize(self, floats: Tensor, step: Tensor, low: Tensor) -> Tensor:
        """In place: values to codes, still as floats. A step that vanishes in float16 makes a group constant."""
        floats.sub_(low).div_(step.to(torch.float32).masked_fill_(step == 0, torch.inf))
        return floats.round_().clamp_(0, 2**self.bits - 1)

    def _write_words(self, floats: Tensor, words: Tensor) -> None:
        """Codes as floats [..., D] into words, uint8 [..., R]; the first code is in the lowest bits, missing ones are 0."""
        values, size = code_word(self.bits)
        whole = words if size == 1 else words.new_empty(*words.shape[:-1], words.shape[-1] // size, dtype=torch.int32)
        whole.zero_()
        for index in range(values):
            part = floats[..., index::values].to(whole.dtype)
            whole[..., : part.shape[-1]].bitwise_or_(part << (self.bits * index))
        if size > 1:
            for byte in range(size):
                words[..., byte::size] = ((whole >> (8 * byte)) & 255).to(torch.uint8)


def _finite(rows: Tensor) -> Tensor:
    """A float32 copy within float16's range."""
    most = torch.finfo(_SCALE).max
    return rows.to(torch.float32, copy=True).nan_to_num_(nan=0.0).clamp_(-most, most)
