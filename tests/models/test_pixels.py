"""Preprocessing against transformers' own PIL processors, pixel for pixel."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_of_videos

from millpond import ModelError, SourceError
from millpond.models import Family, adapt
from tests.models.tiny import FAMILIES, tiny

SIZES = [(56, 70), (97, 31), (200, 300), (13, 17), (480, 640)]


def frame(height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 4, 0), 4, 1)[:height, :width].copy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_patches_equal_the_processors(name: str, size: tuple[int, int]) -> None:
    """A still image is a group of equal frames to the reference."""
    family = tiny(name)
    reference = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 140 * 140}
    )
    want = reference(frame(*size), return_tensors="pt")
    got, grid = family.patches([family.prepare(frame(*size))])
    assert torch.equal(grid, want["image_grid_thw"])
    assert torch.allclose(got, want["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_qwen3_patches_equal_the_processors(size: tuple[int, int]) -> None:
    family = tiny("qwen3_vl")
    reference = Qwen2VLImageProcessorPil(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 14 * 14, "longest_edge": 140 * 140},
    )
    want = reference(frame(*size), return_tensors="pt")
    got, _ = family.patches([family.prepare(frame(*size))])
    assert torch.allclose(got, want["pixel_values"], atol=1e-5)


def test_a_pair_of_frames_is_patched_in_the_order_that_the_tower_was_trained_with() -> None:
    """Written out: patch (g, i, j) holds colour, then time, then rows and columns; merged patches are neighbours."""
    family = tiny("qwen2_vl")
    frames = [family.prepare(frame(28, 42)), family.prepare(frame(28, 42)[::-1].copy())]
    got, grid = family.patches(frames)
    assert grid.tolist() == [[1, 4, 6]]
    scaled = [(f / 255 - np.array(family.mean)) / np.array(family.std) for f in frames]
    rows = [(2 * i + a, 2 * j + b) for i in range(2) for j in range(3) for a in range(2) for b in range(2)]
    for index, (row, col) in enumerate(rows):
        patch = [scaled[t][row * 7 : row * 7 + 7, col * 7 : col * 7 + 7] for t in range(2)]
        want = np.stack(patch, 0).transpose(3, 0, 1, 2).ravel()
        assert np.allclose(got[index].numpy(), want, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_onevision_frames_equal_the_base_view_of_the_processor(size: tuple[int, int]) -> None:
    family = tiny("llava_onevision")
    siglip = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    reference = LlavaOnevisionImageProcessorPil(
        size={"height": 42, "width": 42}, image_grid_pinpoints=[[42, 42]], **siglip
    )
    want = reference(frame(*size), return_tensors="pt")["pixel_values"][0, 0]
    got = family.pixels([family.prepare(frame(*size))])[0, 0]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_next_video_frames_equal_clips_processor(size: tuple[int, int]) -> None:
    """LLaVA-NeXT-Video's video processor resizes the shorter side and crops the middle, as CLIP's image processor does."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    family = tiny("llava_next_video")
    reference = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    want = reference(frame(*size), return_tensors="pt")["pixel_values"][0]
    got = family.pixels([family.prepare(frame(*size))])[0, 0]
    assert torch.allclose(got, want, atol=1e-5)


# As the published checkpoints have them: limits of one still image, and of a whole video.
QWEN2_FILE = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
QWEN3_FILE = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
}
UNIT = 14  # pixels of a merged patch's edge in the tiny models
QWEN2, QWEN3 = tiny("qwen2_vl"), tiny("qwen3_vl")


def with_numbers(name: str, image: dict[str, object] | None) -> Family:
    family = tiny(name)
    return adapt(family.model, family.tokenizer, image)


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), minimum=st.integers(1, 90_000), more=st.integers(0, 90_000)
)
def test_qwen_sizes_follow_the_processors_rule(height: int, width: int, minimum: int, more: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    family = QWEN2
    family.min_pixels, family.max_pixels = minimum, minimum + more
    grid = family.grid(height, width)
    assert (grid.height, grid.width) == smart_resize(height, width, UNIT, minimum, minimum + more)
    assert grid.tokens == grid.rows * grid.cols == grid.height * grid.width // UNIT**2 > 0


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), minimum=st.integers(1, 90_000), more=st.integers(0, 90_000)
)
def test_qwen3_sizes_follow_the_rule_for_a_video_of_one_group(height: int, width: int, minimum: int, more: int) -> None:
    assume(max(height, width) <= 190 * min(height, width))  # small frames are rounded before the reference looks
    family = QWEN3
    family.min_pixels, family.max_pixels = minimum, minimum + more
    grid = family.grid(height, width)
    want = smart_resize_of_videos(2, height, width, 2, UNIT, 2 * minimum, 2 * (minimum + more))
    assert (grid.height, grid.width) == want


def test_a_frames_limits_do_not_hang_on_the_videos_length() -> None:
    """The most is 768 tokens by default and whatever a processor's file allows beyond; numbers given alone are taken."""
    unit = UNIT**2
    for name in ("qwen2_vl", "qwen2_5_vl"):
        assert (family := with_numbers(name, {})).max_pixels == 768 * unit
        assert family.min_pixels == 128 * unit
        assert with_numbers(name, QWEN2_FILE).max_pixels == 768 * unit
        assert with_numbers(name, QWEN2_FILE).min_pixels == 3136
        small = {**QWEN2_FILE, "max_pixels": 60 * unit}
        assert with_numbers(name, small).max_pixels == 60 * unit
        assert with_numbers(name, {"max_pixels": 2000 * unit}).max_pixels == 2000 * unit
        assert with_numbers(name, {"max_pixels": 10 * unit}).min_pixels == 10 * unit
    assert with_numbers("qwen3_vl", QWEN3_FILE).max_pixels == 768 * unit
    assert with_numbers("qwen3_vl", QWEN3_FILE).min_pixels == 4096 // 2
    assert with_numbers("qwen3_vl", {}).max_pixels == 768 * unit
    assert 700 <= with_numbers("qwen2_5_vl", QWEN2_FILE).grid(1080, 1920).tokens <= 768


def test_qwen3_caps_a_frame_as_the_reference_does_with_its_cap() -> None:
    """Golden of its video processor's capped rule: 2 frames of 1080 x 1920 under min(768 tokens, 25165824 / 2 pixels) each."""
    family = with_numbers("qwen3_vl", QWEN3_FILE)
    each = max(min(768 * UNIT**2, 25165824 // 2), int(4096 * 1.05))
    want = smart_resize_of_videos(2, 1080, 1920, 2, UNIT, 4096, 2 * each)
    grid = family.grid(1080, 1920)
    assert (grid.height, grid.width) == want == (280, 504)


def test_numbers_of_a_processors_file_reach_the_pixels() -> None:
    raw = frame(56, 70)
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    for name in FAMILIES:
        family = with_numbers(name, numbers)
        prepared = family.prepare(raw)
        if name.startswith("qwen"):
            got = family.patches([prepared])[0].view(-1, 3, 2 * 7 * 7).mean((0, 2))
        else:
            got = family.pixels([prepared])[0, 0].mean((1, 2))
        want = (prepared.reshape(-1, 3).mean(0) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        assert np.allclose(got.numpy(), want, atol=1e-4)


def test_impossible_sizes() -> None:
    with pytest.raises(ModelError, match="max_pixels must be at least 1, not -3"):
        with_numbers("qwen2_vl", {"max_pixels": -3})
    for name in FAMILIES:
        with pytest.raises(SourceError, match="1000 x 4 is too long and thin"):
            tiny(name).prepare(np.zeros((4, 1000, 3), dtype=np.uint8))
        for side in (0, -3, 1.5, "a"):
            with pytest.raises(SourceError, match="height and width must be whole numbers from 1 on, not"):
                tiny(name).grid(side, 56)  # type: ignore[arg-type]
