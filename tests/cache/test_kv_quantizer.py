"""The low-bit codec against the textbook bound and against a float64 oracle of its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millpond.errors import PolicyError
from millpond.kv_quantization.quantizer import BITS, KVQuantizer
from millpond.ops import dispatch
from millpond.ops.dequantization import unpack_codes
from tests.session.measure import transient_peak

CPU = torch.device("cpu")


def keys_and_back(quantizer: KVQuantizer, keys: Tensor) -> Tensor:
    codes, scales = quantizer.new_keys((), len(keys) // quantizer.group, keys.shape[1], CPU)
    quantizer.quantize_keys(keys, codes, scales)
    out = torch.full_like(keys, torch.nan)
    quantizer.dequantize_keys(codes, scales, out)
    return out


def values_and_back(quantizer: KVQuantizer, values: Tensor) -> Tensor:
    codes, scales = quantizer.new_values((), len(values) // quantizer.group, values.shape[1], CPU)
    quantizer.quantize_values(values, codes, scales)
    out = torch.full_like(values, torch.nan)
    quantizer.dequantize_values(codes, scales, out)
    return out


def bound(group: Tensor, bits: int) -> Tensor:
    """Half a step plus the roundings of step and minimum to float16, for a group along the last axis, in float64."""
    low, high = group.double().aminmax(dim=-1, keepdim=True)
    levels = 2**bits - 1
    step = (high - low) / levels
    tiny, relative = 2.0**-25, 2.0**-11  # half of float16's least number, and half a unit in its last place
    of_step, of_low = torch.clamp(step * relative, min=tiny), torch.clamp(low.abs() * relative, min=tiny)
    single = 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    most: Tensor = step / 2 + levels * of_step + of_low + single
    return most


def by_group(keys: Tensor, size: int) -> Tensor:
    """[m * G, D] keys as [m, D, G], the groups that share a step."""
    return keys.view(-1, size, keys.shape[1]).transpose(1, 2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "width"), [(32, 128), (32, 64), (16, 24), (5, 13), (1, 7)])
def test_errors_stay_within_half_a_step_and_the_roundings(bits: int, group: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits * group + width)
    quantizer = KVQuantizer(bits, group)
    rows = torch.randn(3 * group, width, generator=generator) * torch.randn(width, generator=generator).exp() + 5
    error = by_group((keys_and_back(quantizer, rows) - rows).abs().double(), group)
    assert bool((error <= bound(by_group(rows, group), bits)).all())
    back = values_and_back(quantizer, rows)
    for part, read in zip(rows.split(group, dim=1), back.split(group, dim=1), strict=True):
        assert bool(((read - part).abs().double() <= bound(part, bits)).all())


@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_the_formula_in_float64(bits: int) -> None:
    quantizer, keys = KVQuantizer(bits, 8), torch.randn(16, 5, generator=torch.Generator().manual_seed(bits))
    groups = by_group(keys, 8)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step, low = ((high - low) / (2**bits - 1)).half().double(), low.half().double()
    expected = ((groups - low) / step).round().clamp(0, 2**bits - 1) * step + low
    assert torch.allclose(by_group(keys_and_back(quantizer, keys), 8).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 3, 8, 13, 128])
def test_packing_is_the_identity_on_every_code(bits: int, width: int) -> None:
    quantizer = KVQuantizer(bits, 4)
    codes = (torch.arange(8 * width) * 7 % 2**bits).float().view(2, 4, width)
    quantized = torch.full((2, 4, quantizer.row_bytes(width)), 255, dtype=torch.uint8)
    quantizer._write_words(codes, quantized)
    assert torch.equal(unpack_codes(quantized, bits, width), codes)
    assert quantizer.row_bytes(128) == 128 * bits // 8  # no bit is wasted at a head's width


def test_three_bits_lie_in_three_bytes_lowest_first() -> None:
    quantized = torch.zeros(1, 3, dtype=torch.uint8)
    KVQuantizer(3, 1)._write_words(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 0]]), quantized)
    word = sum(code << (3 * place) for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    assert quantized[0].tolist() == list(word.to_bytes(3, "little"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.integers(1, 9),
    st.integers(1, 20),
    st.floats(-60_000, 60_000),
    st.floats(0, 5_000),
    st.integers(0, 2**31),
)
def test_any_offset_and_spread_stays_within_the_bound(
    bits: int, group: int, width: int, offset: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = (offset + spread * (torch.rand(2 * group, width, generator=generator) - 0.5)).to(torch.float32)
    quantizer = KVQuantizer(bits, group)
    error = by_group((keys_and_back(quantizer, keys) - keys).abs().double(), group)
    assert bool((error <= bound(by_group(keys, group), bits)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("number", [0.0, -3.5, 1e-9, 1024.0])
def test_constants_cost_no_more_than_their_rounding(bits: int, number: float) -> None:
    rows = torch.full((8, 12), number)
    for back in (keys_and_back(KVQuantizer(bits, 4), rows), values_and_back(KVQuantizer(bits, 4), rows)):
        assert torch.equal(back, rows.half().float())


@pytest.mark.parametrize("bits", BITS)
def test_what_was_read_is_written_the_same_again(bits: int) -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    once = keys_and_back(KVQuantizer(bits), rows)
    again = keys_and_back(KVQuantizer(bits), once)
    assert float((again - once).abs().max()) <= 2e-3 * float(rows.abs().max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("bad", "read"), [(torch.nan, 0), (torch.inf, 65504), (-torch.inf, -65504), (1e6, 65504), (-3e38, -65504)]
)
def test_what_float16_cannot_hold_becomes_its_nearest_number(bits: int, bad: float, read: float) -> None:
    quantizer, rows = KVQuantizer(bits, 4), torch.ones(8, 6)
    rows[5, 2] = bad
    for back in (keys_and_back(quantizer, rows), values_and_back(quantizer, rows)):
        clean = rows.clone()
        clean[5, 2] = read
        assert bool(back.isfinite().all())
        assert abs(float(back[5, 2]) - read) <= max(1e-3, 2e-3 * abs(read))
        assert torch.equal(back[:4, 3:], rows[:4, 3:])  # groups without it are what they were


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "width"), [(32, 128), (5, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_storage_and_scratch_is_bounded(
    bits: int, group: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "kernels_enabled", False)  # which takes none
    quantizer = KVQuantizer(bits, group)
    keys, values = quantizer.new_keys((3,), 4, width, CPU), quantizer.new_values((3,), 4, width, CPU)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in (*keys, *values))
    assert stored == 3 * 4 * quantizer.group_bytes(width) == 3 * 4 * group * quantizer.bytes_per_token(width)
    rows = torch.randn(4 * group, width).to(dtype)
    out = torch.empty_like(rows)
    keys, values = tuple(t[0] for t in keys), tuple(t[0] for t in values)  # type: ignore[assignment]
    most = quantizer.scratch_bytes(len(rows), width)
    assert transient_peak(lambda: quantizer.quantize_keys(rows, *keys)) <= most
    assert transient_peak(lambda: quantizer.dequantize_keys(*keys, out)) <= most
    assert transient_peak(lambda: quantizer.quantize_values(rows, *values)) <= most
    assert transient_peak(lambda: quantizer.dequantize_values(*values, out)) <= most


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "width"), [(32, 128), (32, 80), (5, 13), (1, 7), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_reading_is_the_torch_one_bit_for_bit(
    bits: int, group: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, rng = KVQuantizer(bits, group), torch.Generator().manual_seed(group * width)
    rows = torch.randn(6 * group, width, generator=rng) * 10.0 ** torch.randint(-6, 4, (width,), generator=rng) - 1
    rows[0], rows[1 % group] = 1e6, torch.nan
    rows[group : 2 * group] = 1e-7
    keys, values = (new((), 6, width, CPU) for new in (quantizer.new_keys, quantizer.new_values))
    quantizer.quantize_keys(rows, *keys)
    quantizer.quantize_values(rows, *values)

    def read(step: int | None) -> Tensor:
        out = torch.full((2, *rows.shape), torch.nan, dtype=dtype)
        quantizer.dequantize_keys(*keys, out[0], step)
        quantizer.dequantize_values(*values, out[1], step)
        return out

    compiled = read(None)
    monkeypatch.setattr(dispatch, "kernels_enabled", False)
    assert bool(compiled.isfinite().any())
    for step in (None, group, 4 * group, 4 * group + 1):
        assert torch.equal(compiled, read(step))


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (5, 32), (16, 32), (4, 0)])
def test_other_widths_are_refused(bits: int, group: int) -> None:
    with pytest.raises(PolicyError):
        KVQuantizer(bits, group)
