"""Writing frames to a real MP4 file, for demos, generated streams and tests. Knows nothing about sources or models."""

import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.frames.frame import Frame

# The clock of MPEG: fine enough that a time comes back within 6 microseconds.
_TICKS_PER_SECOND = 90_000


def write_mp4(
    path: str | Path, frames: Iterable[tuple[float, NDArray[np.uint8]]], fps: float, *, crf: int = 23
) -> None:
    """Write an MP4 file: H.264, yuv420p, one video stream, the index in front so that the file can also be piped.

    Each frame is shown from its own time on, so a variable rate is kept; times are rounded to 1/90000 s. The first frame
    is at 0 in the file whatever its time here. Nothing is held back: frames are encoded as they come. The file appears under
    its name only when it is complete.

    Args:
        path: the file to write; one that is there is replaced.
        frames: pairs of (seconds, uint8 [H, W, 3] RGB), times ascending, all of one size, H and W even (yuv420p).
        fps: nominal frames per second; says how long the last frame lasts.
        crf: quality of x264, 0 (best) to 51.

    Raises:
        SourceError: no frames, an odd or changing size, times that do not ascend, fps or crf out of range, or the file
            cannot be written.
    """
    if not (np.isfinite(fps) and 0 < fps <= 1000):
        raise SourceError(f"fps must be above 0 and at most 1000, not {fps}")
    if not 0 <= crf <= 51:
        raise SourceError(f"crf must be 0 (best) to 51, not {crf}")
    path = Path(path)
    fault = ""
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".mp4", dir=path.parent)
        os.close(handle)
    except OSError as error:
        fault = error.strerror or type(error).__name__
    if fault:
        raise SourceError(f"cannot write {path}: {fault}")
    try:
        try:
            _encode(part, frames, Fraction(fps).limit_denominator(10_000), crf)
            os.chmod(part, 0o644)
            os.replace(part, path)
        except (av.FFmpegError, OSError) as error:
            fault = error.strerror or type(error).__name__
        if fault:
            raise SourceError(f"cannot write {path}: {fault}")
    finally:
        Path(part).unlink(missing_ok=True)


def _encode(path: str, frames: Iterable[tuple[float, NDArray[np.uint8]]], rate: Fraction, crf: int) -> None:
    start, previous, size = 0.0, -1, None
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        # No B-frames: with them, the length that an MP4 states for a variable rate is that of the decoding order, and wrong.
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "bf": "0"})
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        for seconds, pixels in frames:
            frame = Frame(seconds, pixels)
            height, width, _ = frame.pixels.shape
            if size is None:
                if height % 2 or width % 2:
                    raise SourceError(f"H.264 in yuv420p needs an even width and height, not {width}x{height}")
                start, size = frame.seconds, (height, width)
                stream.height, stream.width = height, width
            elif size != (height, width):
                raise SourceError(f"frames of one file must have one size: {width}x{height} after {size[1]}x{size[0]}")
            ticks = round((frame.seconds - start) * _TICKS_PER_SECOND)
            if ticks <= previous:
                raise SourceError(f"times must ascend: {frame.seconds:.6f} s is not after the frame before it")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.pixels), format="rgb24")
            picture.pts, picture.time_base, previous = ticks, Fraction(1, _TICKS_PER_SECOND), ticks
            # Without it the encoder would count in frames of the nominal rate, and close times would collide.
            picture.duration = round(_TICKS_PER_SECOND / rate)
            for packet in stream.encode(picture):
                container.mux(packet)
        if size is None:
            raise SourceError("no frames to write: a video needs at least one")
        for packet in stream.encode(None):
            container.mux(packet)
