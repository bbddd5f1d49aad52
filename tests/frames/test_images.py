"""Folders of images and single images."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from millpond import frames
from millpond.errors import SourceError
from millpond.frames.images import natural_key
from tests.frames.media import corners, gray


def test_natural_order_rate_and_mixed_sizes(tmp_path: Path) -> None:
    for index, size in [(10, (8, 6)), (9, (4, 4)), (2, (5, 7)), (1, (3, 2))]:
        Image.fromarray(gray(index, *size)).save(tmp_path / f"shot{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("neither")
    with frames.open(tmp_path, fps=4) as source:
        assert (source.info.kind, source.info.fps, source.info.duration) == ("images", 4, 1.0)
        taken = list(source)
    assert [frame.seconds for frame in taken] == [0.0, 0.25, 0.5, 0.75]
    assert [int(frame.pixels[0, 0, 0]) for frame in taken] == [1, 2, 9, 10]
    assert [frame.pixels.shape for frame in taken] == [(3, 2, 3), (5, 7, 3), (4, 4, 3), (8, 6, 3)]
    assert taken[0].pixels.flags.writeable


def test_one_image_a_second_unless_told(tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(gray(index)).save(tmp_path / f"{index}.jpg")
    assert [frame.seconds for frame in frames.open(str(tmp_path))] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(gray(255)).convert(mode).save(path)
    (frame,) = frames.open(path)
    assert (frame.pixels == 255).all()


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_exif_orientation(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners()).save(tmp_path / "a.png", exif=exif)
    (frame,) = frames.open(tmp_path / "a.png")
    assert np.array_equal(frame.pixels, np.rot90(corners(), turns))


def test_a_damaged_image_comes_after_the_good_ones(tmp_path: Path) -> None:
    Image.fromarray(gray(1)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    source = frames.open(tmp_path)
    assert next(source).seconds == 0.0
    with pytest.raises(SourceError, match=r"2\.png"):
        next(source)
    assert list(source) == []


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(gray(1)).save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SourceError, match="too large"):
        list(frames.open(tmp_path))


@pytest.mark.parametrize("kind", ["EPS", "PPM", "GIF", "ICO"])
def test_only_the_named_formats_are_read_whatever_the_name_says(tmp_path: Path, kind: str) -> None:
    """EPS would start Ghostscript on a stranger's PostScript."""
    Image.fromarray(gray(1)).save(tmp_path / "a.png", kind)
    with pytest.raises(SourceError, match="not an image"):
        list(frames.open(tmp_path))


def test_a_named_pipe_in_a_folder_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    Image.fromarray(gray(7)).save(tmp_path / "1.png")
    assert [frame.pixels.mean() for frame in frames.open(tmp_path)] == [7]


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(SourceError, match="no images"):
        frames.open(tmp_path)


def test_natural_key() -> None:
    names = ["b1", "a10b2", "a2", "A1", "a10b10", "10", "9", "x²"]
    assert sorted(names, key=natural_key) == ["9", "10", "A1", "a2", "a10b2", "a10b10", "b1", "x²"]
