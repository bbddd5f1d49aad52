"""The MP4 writer, judged by decoding with PyAV directly."""

from pathlib import Path

import av
import numpy as np
import pytest

from millpond.errors import SourceError
from millpond.frames import write_mp4


def gray(level: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_times_levels_and_length_come_back(tmp_path: Path) -> None:
    times, levels = [3.0, 3.5, 3.53, 4.2, 7.0], [0, 60, 120, 180, 240]
    path = tmp_path / "clip.mp4"
    write_mp4(path, [(time, gray(level)) for time, level in zip(times, levels, strict=True)], fps=2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.duration * stream.time_base) == pytest.approx(4.5, abs=1e-3)
        decoded = [(frame.time, frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(stream)]
    assert [time for time, _ in decoded] == pytest.approx([time - 3.0 for time in times], abs=1e-5)
    assert [level for _, level in decoded] == pytest.approx(levels, abs=3)


def test_the_index_is_in_front(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, ((i / 10, gray(9 * i)) for i in range(20)), fps=10)
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_quality_follows_crf(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    frames = [(i / 10, random.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for i in range(5)]
    write_mp4(tmp_path / "fine.mp4", frames, fps=10, crf=5)
    write_mp4(tmp_path / "coarse.mp4", frames, fps=10, crf=45)
    assert (tmp_path / "fine.mp4").stat().st_size > 2 * (tmp_path / "coarse.mp4").stat().st_size


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([(0.0, gray(0, 47, 64))], "even"),
        ([(0.0, gray(0)), (1.0, gray(0, 48, 32))], "one size"),
        ([(0.0, gray(0)), (0.0, gray(0))], "ascend"),
        ([(0.0, gray(0).astype(np.float32))], "uint8"),
        ([(float("nan"), gray(0))], "finite"),
    ],
)
def test_bad_frames_leave_no_file(tmp_path: Path, frames: list[tuple[float, np.ndarray]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        write_mp4(tmp_path / "clip.mp4", frames, fps=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fps", "crf"), [(0, 23), (-1, 23), (float("inf"), 23), (2, 52)])
def test_bad_arguments(tmp_path: Path, fps: float, crf: int) -> None:
    with pytest.raises(SourceError):
        write_mp4(tmp_path / "clip.mp4", [(0.0, gray(0))], fps=fps, crf=crf)


def test_an_existing_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, [(0.0, gray(0))], fps=2)
    before = path.read_bytes()
    with pytest.raises(SourceError):
        write_mp4(path, [(0.0, gray(0)), (0.0, gray(0))], fps=2)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot write"):
        write_mp4(tmp_path / "no" / "clip.mp4", [(0.0, gray(0))], fps=2)
