"""A folder of images, or one image, as a stream at a given rate. Knows nothing about video containers."""

import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from millpond.errors import SourceError
from millpond.frames.address import IMAGE_SUFFIXES, Address
from millpond.frames.sampling import Pending
from millpond.frames.source import SourceInfo
from millpond.printable import printable

DEFAULT_FPS = 1.0
# Pillow's names of what IMAGE_SUFFIXES stand for. It goes by content, and for others (EPS) it would start programs on it.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")


class Images:
    """Images in natural order of their names (2.png before 10.png): image i is at i / fps seconds. A `Feed`.

    Images may differ in size, and are turned upright by their EXIF orientation. Each is read when its turn comes.

    Args:
        address: a folder, not searched below, or one image.
        fps: images per second.

    Raises:
        SourceError: no image is there.
    """

    damaged = 0

    def __init__(self, address: Address, *, fps: float, live: bool) -> None:
        path = Path(address.target)
        self._fps = fps
        self._cancelled = False
        self._paths = [path]
        if path.is_dir():
            named = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            # A named pipe would wait for ever for who writes to it; a link that leads nowhere is told when its turn comes.
            found = (p for p in named if p.is_file() or not p.exists())
            self._paths = sorted(found, key=lambda p: natural_key(p.name))
        if not self._paths:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise SourceError(f"no images in the folder {address.name}: they must end in {suffixes}")
        self.info = SourceInfo(
            name=address.name, kind="images", live=live, fps=fps, duration=None if live else len(self._paths) / fps
        )

    def __iter__(self) -> Iterator[Pending]:
        for index, path in enumerate(self._paths):
            if self._cancelled:
                return
            yield Pending(index / self._fps, partial(read_image, path))

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self._cancelled = True


def read_image(path: Path) -> NDArray[np.uint8]:
    """One image, upright: uint8 [H, W, 3] RGB. Raises SourceError where it cannot be read."""
    fault = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        fault = "it is too large"
    except Exception as error:  # Pillow's plug-ins raise what they like on damaged data
        fault = getattr(error, "strerror", None) or "it is damaged, or not an image"
    raise SourceError(f"cannot read the image {printable(str(path))}: {fault}")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), part) if part[0].isdigit() and part.isascii() else (1, 0, part) for part in parts]
