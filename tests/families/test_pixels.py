"""Preprocessing against transformers' own PIL processors, pixel for pixel."""

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.families.tiny import tiny

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
    reference = LlavaOnevisionImageProcessorPil(size={"height": 42, "width": 42}, image_grid_pinpoints=[[42, 42]])
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
