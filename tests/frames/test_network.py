"""Network sources over the loopback, with real sockets and real decoding."""

import gc
import logging
import socket
import threading
import traceback
from itertools import pairwise
from pathlib import Path

import av
import pytest

from millpond import frames
from millpond.errors import SourceError
from millpond.frames import write_mp4
from tests.frames.media import gray, noise, write
from tests.frames.servers import ByteServer, RtspServer, http_server, motion_jpeg, rtp_packets, send_file

PATIENCE_SECONDS = 20.0
SECRETS = ("hunter2", "s3cr3t", "adm1n")
# Not spelled out in the tests, whose own lines a traceback quotes.
USER, QUERY = f"{SECRETS[2]}:{SECRETS[0]}", f"token={SECRETS[1]}&key={SECRETS[1]}"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_mp4(tmp_path / "clip.mp4", [(i / 10, gray(4 * i)) for i in range(40)], fps=10)
    return tmp_path / "clip.mp4"


@pytest.fixture
def stream(tmp_path: Path) -> bytes:
    """4 s of MPEG-TS, as a camera sends it."""
    return write(tmp_path / "live.ts", noise(40), options={"g": "10", "bf": "0"}).read_bytes()


def watch(source: frames.Source) -> tuple[list[float], str]:
    """All times, and the error at the end."""
    seconds: list[float] = []
    try:
        for frame in source:
            seconds.append(frame.seconds)
    except SourceError as error:
        return seconds, str(error)
    return seconds, ""


def test_http_serves_a_file(clip: Path) -> None:
    with http_server(send_file(clip)) as port, frames.open(f"http://127.0.0.1:{port}/clip.mp4", fps=2) as source:
        assert (source.info.kind, source.info.live) == ("url", False)
        assert source.info.duration == pytest.approx(4.0)
        assert [frame.seconds for frame in source] == [i / 2 for i in range(8)]
        assert source.dropped == 0


def test_http_file_that_ends_early(clip: Path, tmp_path: Path) -> None:
    content = clip.read_bytes()
    (tmp_path / "part.mp4").write_bytes(content[: len(content) * 2 // 3])
    with http_server(send_file(tmp_path / "part.mp4", length=len(content))) as port:
        source = frames.open(f"http://127.0.0.1:{port}/clip.mp4")
        assert next(source).seconds == 0.0
        with pytest.raises(SourceError, match=r"127\.0\.0\.1.*/clip\.mp4"):
            list(source)


def test_motion_jpeg_over_http_is_live_and_timed_by_arrival() -> None:
    with http_server(motion_jpeg(30)) as port, frames.open(f"http://127.0.0.1:{port}/video", retries=0) as source:
        assert source.info.live
        assert source.info.codec == "mjpeg"
        seconds, error = watch(source)
        assert "lost" in error
    assert seconds[0] >= 0.0
    assert all(a < b for a, b in pairwise(seconds))
    assert len(seconds) + source.dropped + source.damaged == 30


def test_tcp_is_live_and_ends_with_an_error_when_it_is_lost(stream: bytes) -> None:
    with ByteServer(stream) as server:
        source = frames.open(f"tcp://127.0.0.1:{server.port}", fps=5, retries=0)
        assert (source.info.live, source.info.codec, source.info.width) == (True, "h264", 64)
        seen, error = watch(source)
        assert f"tcp://127.0.0.1:{server.port} was lost" in error
    assert seen[-1] == 3.8
    assert len(seen) + source.dropped == 20


def test_rtsp_with_a_password(tmp_path: Path) -> None:
    with RtspServer(rtp_packets(tmp_path, 40), credentials=USER) as server:
        with pytest.raises(SourceError, match="401"):
            frames.open(f"rtsp://127.0.0.1:{server.port}/camera")
        source = frames.open(f"rtsp://{USER}@127.0.0.1:{server.port}/camera", fps=5, retries=0)
        assert (source.info.live, source.info.codec) == (True, "h264")
        assert source.info.name == f"rtsp://127.0.0.1:{server.port}/camera"
        seconds, error = watch(source)
    assert "lost" in error
    assert all(a < b for a, b in pairwise(seconds))
    assert seconds[-1] == pytest.approx(3.8, abs=0.11)
    assert len(seconds) + source.dropped in (19, 20)


def test_live_false_gives_every_frame_of_a_stream(stream: bytes) -> None:
    with ByteServer(stream) as server:
        source = frames.open(f"tcp://127.0.0.1:{server.port}", live=False)
        assert len(list(source)) == 40
        assert (source.dropped, server.clients) == (0, 1)


def test_a_server_that_is_killed_and_started_again(stream: bytes) -> None:
    first = ByteServer(stream, hold=True)
    source = frames.open(f"tcp://127.0.0.1:{first.port}", fps=10)
    seconds = [next(source).seconds]
    first.close()
    # Whatever the first still delivered comes before the loss; more than 4 s of stream are only there after it.
    with ByteServer(stream, hold=True, port=first.port) as second:
        while seconds[-1] <= 4.0:
            seconds.append(next(source).seconds)
        assert second.clients == 1
        source.close()
    assert all(a < b for a, b in pairwise(seconds))


def test_silence_is_a_loss(stream: bytes) -> None:
    with ByteServer(stream, hold=True) as server:
        source = frames.open(f"tcp://127.0.0.1:{server.port}", timeout=1.0, retries=0)
        with pytest.raises(SourceError, match="no data"):
            list(source)


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SourceError, match=rf"cannot open tcp://127\.0\.0\.1:{port}: Connection refused"):
        frames.open(f"tcp://127.0.0.1:{port}")


def test_a_protocol_that_ffmpeg_was_built_without_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's wheels have no srt, others may."""

    def refuse(*_: object, **__: object) -> None:
        raise av.error.ProtocolNotFoundError(1330794744, "Protocol not found", "srt://127.0.0.1:1")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(SourceError, match="built without this kind of address"):
        frames.open("srt://127.0.0.1:1")


def test_close_while_the_stream_is_silent(stream: bytes) -> None:
    with ByteServer(stream, hold=True) as server:
        source = frames.open(f"tcp://127.0.0.1:{server.port}", timeout=5.0)
        got_one, ended = threading.Event(), threading.Event()

        def consume() -> None:
            for _ in source:
                got_one.set()
            ended.set()

        threading.Thread(target=consume, daemon=True).start()
        assert got_one.wait(PATIENCE_SECONDS)
        source.close()
        assert ended.wait(PATIENCE_SECONDS)


def everything_said(error: BaseException, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    said = [str(error), repr(error), "".join(traceback.format_exception(error)), caplog.text, *capfd.readouterr()]
    seen: BaseException | None = error
    while seen is not None:
        said.append(repr(seen.args))
        seen = seen.__cause__ or seen.__context__
    return "\n".join(said)


@pytest.mark.parametrize("scheme", ["tcp", "http", "rtsp", "rtmp"])
def test_no_secret_is_told_when_nobody_answers(
    scheme: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SourceError) as caught:
        frames.open(f"{scheme}://{USER}@127.0.0.1:{port}/x?{QUERY}", timeout=3.0)
    said = everything_said(caught.value, caplog, capfd)
    assert str(port) in said
    assert not any(secret in said for secret in SECRETS)


def test_no_secret_is_told_by_a_source_that_works_or_breaks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    write_mp4(tmp_path / "clip.mp4", [(i / 10, picture) for i, picture in enumerate(noise(40))], fps=10)
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "part.mp4").write_bytes(content[: len(content) // 2])
    with http_server(send_file(tmp_path / "part.mp4", length=len(content))) as port:
        source = frames.open(f"http://{USER}@127.0.0.1:{port}/clip.mp4?{QUERY}")
        shown = repr(source) + repr(source.info) + str(source)
        with pytest.raises(SourceError) as caught:
            list(source)
    said = everything_said(caught.value, caplog, capfd)
    assert "/clip.mp4" in shown
    assert not any(secret in shown + said for secret in SECRETS)


def test_no_secret_is_told_when_the_server_refuses(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        http_server(lambda request: request.send_error(401)) as port,
        pytest.raises(SourceError, match="401") as caught,
    ):
        frames.open(f"http://{USER}@127.0.0.1:{port}/clip.mp4?{QUERY}")
    said = everything_said(caught.value, caplog, capfd)
    assert not any(secret in said for secret in SECRETS)


def test_threads_end_with_their_sources(stream: bytes) -> None:
    def readers() -> int:
        return sum(thread.name == "millpond-frames" for thread in threading.enumerate())

    before = readers()
    with ByteServer(stream) as server:
        for _ in range(3):
            with frames.open(f"tcp://127.0.0.1:{server.port}", live=False) as source:
                next(source)
    gc.collect()
    assert readers() == before
