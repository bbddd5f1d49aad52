"""Real clips against FFmpeg's own count; only where MILLPOND_CLIPS names the folder that `tests.clips.fetch` filled."""

import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from millpond import frames

FOLDER = os.environ.get("MILLPOND_CLIPS")
CLIPS = sorted(path for path in Path(FOLDER).iterdir() if path.suffix in (".avi", ".mp4", ".mpg")) if FOLDER else []
SQUARE = {"carphone_pristine.mp4": (193, 144), "carphone_distorted.mp4": (193, 144)}

pytestmark = pytest.mark.skipif(not CLIPS or shutil.which("ffprobe") is None, reason="needs MILLPOND_CLIPS and ffprobe")


def counted(path: Path) -> int:
    """Pictures that ffprobe decodes."""
    words = ["-v", "error", "-count_frames", "-select_streams", "v:0", "-show_entries", "stream=nb_read_frames"]
    done = subprocess.run(
        ["ffprobe", *words, "-of", "csv=p=0", str(path)],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return int(done.stdout.strip().splitlines()[0].strip(","))


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_every_picture_that_ffmpeg_decodes_is_given_out_in_order(path: Path) -> None:
    with frames.open(path) as source:
        seconds = []
        for frame in source:
            seconds.append(frame.seconds)
            assert frame.pixels.shape[1::-1] == SQUARE.get(path.name, frame.pixels.shape[1::-1])
        assert source.damaged == 0
    assert len(seconds) == counted(path)
    steps = [b - a for a, b in pairwise(seconds)]
    assert all(step > 0 for step in steps)
    # Even: no picture is set far from where its neighbours put it.
    assert max(steps) < 3 * (seconds[-1] / len(steps))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_b_frames_in_avi(tmp_path: Path) -> None:
    film = tmp_path / "h.avi"
    source = next(path for path in CLIPS if path.name == "bikes.mp4")
    words = ["-v", "error", "-i", str(source), "-c:v", "libx264", "-bf", "3", "-an", str(film)]
    subprocess.run(["ffmpeg", *words], check=True, stdin=subprocess.DEVNULL)
    assert sum(1 for _ in frames.open(film)) == counted(film) == 250
