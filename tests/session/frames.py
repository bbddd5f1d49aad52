"""Small synthetic frames for tests: moving blobs on noise, so that frames differ."""

from collections.abc import Iterator

import numpy as np

from millpond.frames import Frame


def moving(
    count: int, *, fps: float = 2.0, height: int = 56, width: int = 56, seed: int = 0, start: float = 0.0
) -> Iterator[Frame]:
    random = np.random.default_rng(seed)
    ground = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
    for index in range(count):
        pixels = ground.copy()
        x, y = (7 * index) % (width - 12), (5 * index) % (height - 12)
        pixels[y : y + 12, x : x + 12] = random.integers(100, 255, 3, dtype=np.uint8)
        yield Frame(start + index / fps, pixels)
