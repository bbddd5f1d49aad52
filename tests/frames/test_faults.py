"""Files that are cut, damaged or no video: frames, then one clear SourceError; never anything else, never a hang."""

import gc
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond import frames
from millpond.errors import SourceError
from millpond.frames import decoding
from tests.frames.media import gray, noise, write, write_sound


def watch(path: Path) -> tuple[list[frames.Frame], SourceError | None]:
    """All frames of a file, and the error that ended them."""
    taken: list[frames.Frame] = []
    try:
        with frames.open(path) as source:
            for frame in source:
                taken.append(frame)
    except SourceError as error:
        return taken, error
    return taken, None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 s with reordered pictures, the index in front."""
    path = tmp_path_factory.mktemp("media") / "whole.mp4"
    return write(path, noise(100), options={"g": "25"}, container_options={"movflags": "faststart"})


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.97])
def test_a_file_cut_short_gives_every_whole_frame_first(whole: Path, tmp_path: Path, share: float) -> None:
    content = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: int(len(content) * share)])
    originals = [frame.pixels for frame in frames.open(whole)]
    with av.open(str(cut)) as container:
        packets = sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(video=0))
    taken, error = watch(cut)
    assert error is not None
    assert "cut short" in str(error) or "damaged" in str(error)
    assert len(taken) == packets
    # Pictures that refer only to what came before are exact.
    assert all(np.array_equal(a.pixels, b) for a, b in zip(taken[:-5], originals, strict=False))


def test_cut_exactly_between_pictures(whole: Path, tmp_path: Path) -> None:
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    end = packets[60].pos
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:end])
    taken, error = watch(tmp_path / "cut.mp4")
    assert len(taken) == 60
    assert "cut short" in str(error)


def test_cut_before_the_index(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(20))
    path.write_bytes(path.read_bytes()[:-500])
    taken, error = watch(path)
    assert taken == []
    assert "cannot open" in str(error)


def test_a_cut_matroska(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", noise(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    taken, error = watch(path)
    assert 20 < len(taken) < 40
    assert "cut short" in str(error) or "damaged" in str(error)


def test_a_hole_in_the_middle_is_stepped_over_and_told(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 6000] = np.random.default_rng(0).bytes(6000)
    (tmp_path / "hole.mp4").write_bytes(content)
    taken, error = watch(tmp_path / "hole.mp4")
    assert "is damaged" in str(error)
    assert 50 < len(taken) < 100
    assert taken[-1].seconds == 9.9


def test_a_damaged_file_counts_what_it_lost(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 6000] = bytes(6000)
    (tmp_path / "hole.mp4").write_bytes(content)
    source = frames.open(tmp_path / "hole.mp4")
    with pytest.raises(SourceError, match=r"is damaged: \d+ of its") as caught:
        list(source)
    assert source.damaged > 0
    assert f" {source.damaged} " in str(caught.value)


def test_a_broadcast_with_losses_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.ts", noise(60), options={"g": "10"})
    content = path.read_bytes()
    packets = [content[i : i + 188] for i in range(0, len(content), 188)]
    path.write_bytes(b"".join(packet for i, packet in enumerate(packets) if i < 20 or i % 40))
    source = frames.open(path)
    taken = list(source)
    assert source.damaged > 0
    assert 20 < len(taken) < 60


def test_sampled_frames_before_a_fault_are_given_out(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    source = frames.open(tmp_path / "cut.mp4", fps=2)
    assert [next(source).seconds for _ in range(10)] == [i / 2 for i in range(10)]
    with pytest.raises(SourceError):
        list(source)
    assert list(source) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"not a video\n" * 500, "not a video"),
        ("readme.txt", b"not a video\n" * 500, "text"),
        ("zeros.mp4", bytes(100_000), "not a video"),
        ("noise.mp4", np.random.default_rng(1).bytes(100_000), ""),
        ("one.mp4", b"x", ""),
    ],
)
def test_no_video(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    taken, error = watch(tmp_path / name)
    assert taken == []
    assert name in str(error)
    assert message in str(error)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_only_also_with_a_cover(tmp_path: Path, cover: bool) -> None:
    _, error = watch(write_sound(tmp_path / "song.mp4", cover=cover))
    assert "only sound" in str(error)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", [gray(0)])

    def refuse(*_: object, **__: object) -> None:
        raise av.error.PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(av, "open", refuse)  # root, as in containers, may read everything
    with pytest.raises(SourceError, match="Permission denied"):
        frames.open(path)


def test_a_header_that_claims_a_giant_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4", [gray(0)] * 3)
    monkeypatch.setattr("millpond.frames.decoding._MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(SourceError, match="not one picture"):
        frames.open(path)


def test_no_trace_of_the_decoders_own_error(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no")
    with pytest.raises(SourceError) as caught:
        frames.open(tmp_path / "text.mp4")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "av.error" not in "".join(traceback.format_exception(caught.value))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short clips, one of each container."""
    folder = tmp_path_factory.mktemp("small")
    for name, codec in [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4")]:
        write(folder / f"clip.{name}", noise(6), codec=codec, options={"bf": "1"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_frames_or_one_error(small: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((small / f"clip.{name}").read_bytes())
    # Headers and indexes are small beside the pictures: aim at both.
    place = st.integers(0, len(content) - 1) | st.integers(0, 200) | st.integers(len(content) - 1200, len(content) - 1)
    for position, value in data.draw(st.dictionaries(place, st.integers(0, 255), min_size=1, max_size=12)).items():
        content[position] = value
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content))) :]
    path = tmp_path / f"flipped.{name}"
    path.write_bytes(content)
    taken, error = watch(path)
    ascending = all(a.seconds < b.seconds for a, b in pairwise(taken))
    assert ascending
    assert error is None or "\n" not in str(error)


@pytest.mark.slow
def test_memory_stays_flat_over_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", (gray(i % 256, 240, 320) for i in range(1500)), options={"preset": "ultrafast"})
    decoded: list[float] = []
    plain = decoding.Pending

    def counted(*args: Any) -> decoding.Pending:
        pending = plain(*args)
        decoded.append(pending.seconds)
        return pending

    monkeypatch.setattr(decoding, "Pending", counted)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with frames.open(path) as source:
        sizes: list[int] = []
        for index, _ in enumerate(source):
            assert len(decoded) <= index + 1  # nothing ahead of the consumer
            if index % 250 == 249:
                sizes.append(resident())
    assert index == 1499
    # The 1250 frames in between are 288 MB as RGB; the decoder's own pools fill at the beginning.
    assert sizes[-1] - sizes[0] < 40_000_000


def frames_of(path: Path) -> Iterator[frames.Frame]:
    yield from frames.open(path)


def test_a_forgotten_source_lets_go_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", noise(20))

    def handles() -> int:
        return sum(str(link.resolve()) == str(path) for link in Path("/proc/self/fd").iterdir())

    running = frames_of(path)
    next(running)
    assert handles() == 1
    del running
    gc.collect()
    assert handles() == 0
