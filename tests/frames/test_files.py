"""Whole video files of every kind, decoded."""

import gc
import threading
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from millpond import frames
from millpond.frames import write_mp4
from millpond.frames.orientation import upright
from millpond.frames.timing import StreamTimes
from tests.frames.media import corners, forget_order, gray, noise, write


def test_h264_mp4_with_reordered_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", (gray(10 * i) for i in range(20)), options={"bf": "3", "g": "12"})
    with frames.open(path) as source:
        info = source.info
        taken = list(source)
        assert (source.dropped, source.damaged) == (0, 0)
    assert (info.name, info.kind, info.live, info.codec) == (str(path), "file", False, "h264")
    assert (info.width, info.height, info.fps) == (64, 48, 10.0)
    assert info.duration == pytest.approx(2.0)
    assert [frame.seconds for frame in taken] == [i / 10 for i in range(20)]
    assert [frame.pixels.mean() for frame in taken] == pytest.approx([10 * i for i in range(20)], abs=3)
    assert taken[0].pixels.dtype == np.uint8
    assert taken[0].pixels.flags.writeable
    assert taken[0].pixels.flags.c_contiguous


def test_equals_a_plain_decoding(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(12))
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    taken = [frame.pixels for frame in frames.open(path)]
    assert np.array_equal(taken, plain)


LEVELS = [8 * i for i in range(30)]  # a picture's level tells which it is


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.avi", "libx264", {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}),
        ("clip.avi", "mpeg4", {"bf": "2", "g": "12", "qmin": "2", "qmax": "2"}),
        ("clip.mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "b-adapt=0:b-pyramid=1"}),
    ],
)
def test_reordered_pictures_whose_file_does_not_say_so(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = write(tmp_path / name, map(gray, LEVELS), codec=codec, options=options)
    if path.suffix != ".avi":  # which cannot say it
        path = forget_order(path, tmp_path / "careless.mp4")
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(LEVELS)
    with frames.open(path) as source:
        taken = list(source)
        assert source.damaged == 0
    assert [frame.pixels.mean() for frame in taken] == pytest.approx(LEVELS, abs=4)
    assert [frame.seconds for frame in taken] == pytest.approx([i / 10 for i in range(len(LEVELS))], abs=1e-3)


def test_reordered_pictures_in_matroska_with_times_in_decoding_order(tmp_path: Path) -> None:
    """There nothing tells before the first picture steps back; the few given out by then keep their places."""
    options = {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}
    whole = write(tmp_path / "whole.mp4", map(gray, LEVELS), options=options)
    taken = list(frames.open(forget_order(whole, tmp_path / "clip.mkv")))
    assert [frame.pixels.mean() for frame in taken] == pytest.approx(LEVELS, abs=4)
    seconds = [frame.seconds for frame in taken]
    assert all(a < b for a, b in pairwise(seconds))
    assert seconds[8:] == pytest.approx([i / 10 for i in range(8, len(LEVELS))], abs=2e-3)


@pytest.mark.parametrize(("aspect", "shown"), [("2:1", (48, 128)), ("1:2", (96, 64))])
def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, aspect: str, shown: tuple[int, int]) -> None:
    path = write(tmp_path / "clip.mp4", [corners()] * 3, codec="mpeg4", options={"aspect": aspect})
    with frames.open(path) as source:
        assert (source.info.height, source.info.width) == next(source).pixels.shape[:2] == shown


def test_rotation_is_undone_after_stretching(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [corners()] * 3, codec="mpeg4", options={"aspect": "2:1"}, rotation=90)
    (frame, *_) = frames.open(path)
    assert frame.pixels.shape == (128, 48, 3)
    assert (frame.pixels[0, 0] > 100).tolist() == [False, True, False]  # the right upper corner


@pytest.mark.slow
def test_a_decoded_picture_is_gone_when_it_has_been_used(tmp_path: Path) -> None:
    """Not when the garbage collector comes by: at 4K that would be gigabytes."""
    path = write(tmp_path / "clip.mp4", map(gray, LEVELS))
    gc.collect()
    gc.disable()
    try:
        with frames.open(path) as source:
            left = [sum(type(thing) is av.VideoFrame for thing in gc.get_objects()) for _ in source]
    finally:
        gc.enable()
    assert len(left) == len(LEVELS)
    assert max(left) <= 10  # what the decoder gives out at once, and the one whose turn was read


def test_a_variable_rate_is_sampled_by_presentation_time(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 0.5, 0.52, 3.0, 3.1, 3.9, 4.0, 4.6]
    write_mp4(tmp_path / "clip.mp4", [(time, gray(20 * i)) for i, time in enumerate(times)], fps=10)
    taken = list(frames.open(tmp_path / "clip.mp4", fps=2))
    assert [frame.seconds for frame in taken] == pytest.approx([0.0, 0.5, 3.0, 3.9, 4.0, 4.6], abs=1e-4)
    assert [frame.pixels.mean() for frame in taken] == pytest.approx([0, 60, 100, 140, 160, 180], abs=3)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_undone(tmp_path: Path, rotation: int) -> None:
    path = write(tmp_path / "clip.mp4", [corners()] * 3, rotation=rotation)
    with av.open(str(path)) as container:
        told = next(container.decode(video=0)).rotation
    assert told % 360 == rotation
    with frames.open(path) as source:
        expected = np.rot90(corners(), rotation // 90)
        assert (source.info.height, source.info.width) == expected.shape[:2]
        assert np.abs(next(source).pixels.astype(int) - expected)[4::8, 4::8].max() < 12


def test_upright_maps_coordinates_as_the_matrix_says() -> None:
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for matrix in [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)] + [
        (0, b, c, 0) for b in (1, -1) for c in (1, -1)
    ]:
        a, b, c, d = matrix
        moved = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in moved), min(y for _, y in moved)
        turned = upright(picture, (a << 16, b << 16, c << 16, d << 16))
        assert turned.shape[:2] == ((2, 3) if a else (3, 2))
        for (x, y), pixel in moved.items():
            assert np.array_equal(turned[y - top, x - left], pixel)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("high10.mp4", "libx264", "yuv420p10le"),
        ("high422.mp4", "libx264", "yuv422p10le"),
        ("main10.mp4", "libx265", "yuv420p10le"),
        ("main12.mkv", "libx265", "yuv444p12le"),
        ("vp9.webm", "libvpx-vp9", "yuv420p"),
        ("av1.mkv", "libsvtav1", "yuv420p10le"),
        ("mpeg4.avi", "mpeg4", "yuv420p"),
        ("stream.ts", "libx264", "yuv420p"),
        ("lossless.mkv", "ffv1", "yuv420p16le"),
        ("motion.mov", "mjpeg", "yuvj422p"),
        ("animation.gif", "gif", "rgb8"),
    ],
)
def test_codecs_depths_and_containers(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write(tmp_path / name, [corners(96, 128)] * 8, codec=codec, pix_fmt=pix_fmt, options=options)
    taken = list(frames.open(path))
    assert [frame.seconds for frame in taken] == pytest.approx([i / 10 for i in range(8)], abs=2e-3)
    # GIF has 3 bits of red and green and 2 of blue here.
    assert np.abs(taken[-1].pixels.astype(int) - corners(96, 128))[4::8, 4::8].max() < (64 if codec == "gif" else 12)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.webm", "libvpx-vp9", "yuv420p"), ("a.mp4", "libx264", "yuv444p"), ("a.avi", "mpeg4", "yuv420p")],
)
def test_odd_sizes(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    picture = np.ascontiguousarray(corners()[:47, :63])
    (frame, *_) = frames.open(write(tmp_path / name, [picture] * 3, codec=codec, pix_fmt=pix_fmt))
    assert frame.pixels.shape == (47, 63, 3)
    assert np.abs(frame.pixels.astype(int) - picture)[4::8, 4::8].max() < 12


def test_names_that_look_like_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "concat:a|b ü #1%20?.mp4", [(0.0, gray(7))], fps=1)
    monkeypatch.chdir(tmp_path)
    assert len(list(frames.open("concat:a|b ü #1%20?.mp4"))) == 1


def test_a_recording_that_begins_inside_a_group_of_pictures_is_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.ts", noise(60), options={"g": "20", "bf": "0"})
    content = path.read_bytes()
    packets = len(content) // 188
    cut = tmp_path / "cut.ts"
    cut.write_bytes(content[: 188 * 3] + content[188 * (packets // 5) :])
    taken = list(frames.open(cut))
    assert 38 <= len(taken) < 60
    assert taken[0].seconds == 0.0


def test_joined_recordings_go_on_in_time(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ts", (gray(100) for _ in range(30))).read_bytes()
    second = write(tmp_path / "b.ts", (gray(200) for _ in range(30))).read_bytes()
    (tmp_path / "both.ts").write_bytes(first + second)
    source = frames.open(tmp_path / "both.ts")
    seconds = [frame.seconds for frame in source]
    assert len(seconds) + source.damaged == 60
    assert source.damaged <= 1  # the join looks like a lost packet
    assert all(0 < b - a < 1.5 for a, b in pairwise(seconds))


def test_times_are_placed_in_order() -> None:
    times = StreamTimes(step=0.1, jumps=True)
    # From zero; kept; out of order; twice; a clock set anew, and what follows it; no time at all.
    given = [5.0, 5.5, 5.4, 5.5, 5.6, 1.0, 1.5, None]
    assert [times.place(time) for time in given] == [0.0, 0.5, None, None, 0.6, 0.7, 1.2, 1.3]
    times = StreamTimes(step=0.1)
    assert [times.place(time) for time in given] == [0.0, 0.5, None, None, 0.6, None, None, 0.7]


def test_decoding_times_take_over_where_stated_ones_step_back() -> None:
    times = StreamTimes(step=1.0)
    given = [(0.0, 2.0), (3.0, 3.0), (2.0, 4.0), (1.0, 5.0), (6.0, 6.0), (5.0, 7.0), (4.0, None)]
    assert [times.place(*pair) for pair in given] == [0.0, 3.0, 3.25, 3.5, 4.0, 5.0, 6.0]
    times = StreamTimes(step=1.0)
    times.by_decoding = True
    assert [times.place(*pair) for pair in given] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    # What has no ascending time of either kind has no place.
    times = StreamTimes(step=1.0)
    assert [times.place(*pair) for pair in [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)]] == [0.0, 1.0, None, 2.0]


def test_arrival_times() -> None:
    clock = iter([100.0, 100.25, 103.0])
    times = StreamTimes(step=0.04, now=lambda: next(clock))
    assert [times.place(time) for time in (7.0, 7.04, None)] == [0.0, 0.25, 3.0]


def test_taking_goes_on_where_it_stopped_and_ends_once(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(i)) for i in range(10)], fps=10)
    source = frames.open(tmp_path / "clip.mp4")
    assert next(source).seconds == 0.0
    assert [frame.seconds for frame in source] == [i / 10 for i in range(1, 10)]
    assert list(source) == []


def test_two_sources_of_one_file(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(20 * i)) for i in range(10)], fps=10)
    with frames.open(tmp_path / "clip.mp4") as one, frames.open(tmp_path / "clip.mp4") as other:
        for a, b in zip(one, other, strict=True):
            assert a.seconds == b.seconds
            assert np.array_equal(a.pixels, b.pixels)


def test_close_ends_it(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(i)) for i in range(50)], fps=10)
    source = frames.open(tmp_path / "clip.mp4")
    next(source)
    source.close()
    source.close()
    assert list(source) == []
    assert source.info.width == 64


def test_close_from_another_thread_while_it_is_read(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(i % 256)) for i in range(400)], fps=10)
    for after in (1, 5, 20):
        source = frames.open(tmp_path / "clip.mp4")
        seen = 0
        closer = threading.Thread(target=source.close)
        for _ in source:
            seen += 1
            if seen == after:
                closer.start()
        closer.join()
        assert after <= seen <= 400
        assert list(source) == []


def test_a_file_played_live_keeps_its_own_time(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", [(i / 100, gray(i)) for i in range(10)], fps=100)
    with frames.open(tmp_path / "clip.mp4", live=True) as source:
        assert source.info.live
        assert source.info.duration is None
        taken = [frame.seconds for frame in source]
        assert len(taken) + source.dropped == 10
    assert taken[-1] == 0.09
    assert all(a < b for a, b in pairwise(taken))
