"""Real MP4 files for tests."""

from pathlib import Path

import av

from tests.session.frames import moving


def write_clip(path: Path, *, frames: int, fps: int, size: int = 56) -> Path:
    """H.264, one moving blob, every tenth frame a key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "10", "preset": "ultrafast"}
        for frame in moving(frames, height=size, width=size):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path
