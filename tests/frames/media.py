"""Real media files for the tests of sources, made with PyAV."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def gray(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def noise(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures that do not compress well, each a shift of the one before."""
    ground = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return [np.ascontiguousarray(np.roll(ground, 3 * i, axis=1)) for i in range(count)]


def corners(height: int = 48, width: int = 64) -> np.ndarray:
    """Red, green / blue, white quarters, so that every turn and mirror shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 200, 0, 0
    picture[: height // 2, width // 2 :] = 0, 200, 0
    picture[height // 2 :, : width // 2] = 0, 0, 200
    picture[height // 2 :, width // 2 :] = 200, 200, 200
    return picture


def write(
    path: Path,
    pictures: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 10,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    with av.open(str(path), "w", options=container_options or {}, format=format) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        for index, picture in enumerate(pictures):
            if index == 0:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pix_fmt
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, fps)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def write_sound(path: Path, *, cover: bool = False) -> Path:
    """Half a second of silence; with a cover picture where asked."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        art = None
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 64, 48, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        for index in range(24):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 1024 * index, Fraction(1, 48000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
        if art is not None:
            for packet in [*art.encode(av.VideoFrame.from_ndarray(gray(9), format="rgb24")), *art.encode(None)]:
                container.mux(packet)
    return path


def forget_order(source: Path, target: Path) -> Path:
    """The same packets in another file that says of each that it is shown when it is decoded, as careless writers do."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        taken = read.streams.video[0]
        given = write.add_stream_from_template(taken)
        first = None
        for packet in read.demux(taken):
            if packet.size:
                first = packet.dts if first is None else first
                packet.pts = packet.dts = packet.dts - first
                packet.stream = given
                write.mux(packet)
    return target
