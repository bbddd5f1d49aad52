"""Playlists: what they may open, from a folder and from a server; and lists of files that are not read at all."""

import http.server
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from millpond import frames
from millpond.errors import SourceError
from tests.frames.media import gray, noise, write
from tests.frames.servers import http_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A playlist of two parts, 4 s, in a folder of its own; a film outside it."""
    made = tmp_path / "camera"
    made.mkdir()
    options = {"hls_time": "2", "hls_playlist_type": "vod"}
    write(made / "list.m3u8", noise(40), options={"g": "20", "bf": "0"}, container_options=options, format="hls")
    write(tmp_path / "secret.ts", (gray(9) for _ in range(10)))
    return made


def playlist(*names: str, end: bool = True) -> str:
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:2", "#EXT-X-MEDIA-SEQUENCE:0"]
    lines += [line for name in names for line in ("#EXTINF:1.0,", name)]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if end else [])]) + "\n"


def serving(folder: Path, asked: list[str]) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """Files of a folder; every path that was asked for is noted."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        content = (folder / request.path.partition("?")[0].lstrip("/")).read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def test_a_playlist_plays_the_files_of_its_folder(folder: Path) -> None:
    with frames.open(folder / "list.m3u8", fps=5) as source:
        assert (source.info.kind, source.info.live) == ("file", False)
        assert len(list(source)) == 20


@pytest.mark.parametrize("name", ["{outside}", "../secret.ts", "file://{outside}", "file:{outside}", "link.ts"])
def test_a_local_playlist_stays_in_its_folder_unless_allowed(folder: Path, name: str) -> None:
    outside = folder.parent / "secret.ts"
    (folder / "link.ts").symlink_to(outside)
    (folder / "bad.m3u8").write_text(playlist(name.format(outside=outside)))
    with pytest.raises(SourceError, match=r"secret\.ts, which is outside its folder: .*--allow-path"):
        list(frames.open(folder / "bad.m3u8"))
    for allowed in (outside, folder.parent):
        assert len(list(frames.open(folder / "bad.m3u8", allow_paths=[allowed]))) == 10


def test_a_part_that_is_refused_in_the_middle_is_told_after_the_good_ones(folder: Path) -> None:
    parts = sorted(path.name for path in folder.glob("*.ts"))
    (folder / "bad.m3u8").write_text(playlist(parts[0], "../secret.ts", parts[1]))
    source = frames.open(folder / "bad.m3u8")
    assert not any((next(source).pixels == 9).all() for _ in range(20))
    with pytest.raises(SourceError, match="outside its folder"):
        list(source)


def test_a_playlist_from_the_network_asks_its_own_host_only(folder: Path) -> None:
    asked: list[str] = []
    other: list[str] = []
    with ExitStack() as stack:
        port = stack.enter_context(http_server(serving(folder, asked)))
        elsewhere = stack.enter_context(http_server(serving(folder, other)))
        assert len(list(frames.open(f"http://127.0.0.1:{port}/list.m3u8", fps=5))) == 20
        assert len(asked) >= 3
        part = next(path.name for path in folder.glob("*.ts"))
        (folder / "bad.m3u8").write_text(playlist(f"http://127.0.0.1:{elsewhere}/{part}?key=hunter2"))
        for source in (f"http://127.0.0.1:{port}/bad.m3u8", folder / "bad.m3u8"):
            with pytest.raises(SourceError, match=rf"127\.0\.0\.1:{elsewhere}, which is not its own host") as caught:
                list(frames.open(source))
            assert "hunter2" not in str(caught.value)
            assert other == []
            for allowed in ("127.0.0.1", f"127.0.0.1:{elsewhere}"):
                assert len(list(frames.open(source, allow_hosts=[allowed]))) == 20
            other.clear()
        (folder / "bad.m3u8").write_text(playlist(f"file://{folder}/{part}"))
        with pytest.raises(SourceError, match="outside its folder"):
            list(frames.open(f"http://127.0.0.1:{port}/bad.m3u8"))


def test_a_redirection_leads_no_further_than_the_playlist(folder: Path) -> None:
    other: list[str] = []
    with http_server(serving(folder, other)) as elsewhere:

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            if request.path.endswith(".ts"):
                request.send_response(302)
                request.send_header("Location", f"http://127.0.0.1:{elsewhere}{request.path}")
                request.end_headers()
            else:
                serving(folder, [])(request)

        with http_server(answer) as port:
            with pytest.raises(SourceError, match="not its own host"):
                list(frames.open(f"http://127.0.0.1:{port}/list.m3u8"))
            assert other == []
            source = frames.open(f"http://127.0.0.1:{port}/list.m3u8", fps=5, allow_hosts=["127.0.0.1"])
            assert len(list(source)) == 20


def test_credentials_go_to_the_playlist_s_own_host(folder: Path) -> None:
    seen: list[str | None] = []

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Authorization"))
        if seen[-1] is None:
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="x"')
            request.end_headers()
        else:
            serving(folder, [])(request)

    with http_server(answer) as port:
        source = frames.open(f"http://127.0.0.1:{port}/list.m3u8", fps=5, credentials=("me", "p@ss:/?"))
        assert len(list(source)) == 20
        assert "p@ss" not in repr(source) + source.info.name
    assert seen[-1] == "Basic bWU6cEBzczovPw=="


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.ffconcat", "ffconcat version 1.0\nfile secret.ts\n"),
        ("list.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-live:2011" type="static"></MPD>'),
        ("camera.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    ],
)  # fmt: skip
def test_other_lists_of_files_are_not_read(folder: Path, name: str, content: str) -> None:
    (folder.parent / name).write_text(content)
    with pytest.raises(SourceError, match="not a video"):
        frames.open(folder.parent / name)
    with (
        http_server(serving(folder.parent, [])) as port,
        pytest.raises(SourceError, match="not a video"),
    ):
        frames.open(f"http://127.0.0.1:{port}/{name}")


def test_an_encrypted_playlist_is_told(folder: Path) -> None:
    (folder / "key").write_bytes(bytes(16))
    text = (folder / "list.m3u8").read_text()
    (folder / "list.m3u8").write_text(text.replace("#EXTINF", '#EXT-X-KEY:METHOD=AES-128,URI="key"\n#EXTINF', 1))
    with pytest.raises(SourceError, match="is encrypted, which is not read"):
        list(frames.open(folder / "list.m3u8"))


def test_a_playlist_without_an_end_is_live_and_confined_too(folder: Path) -> None:
    parts = sorted(path.name for path in folder.glob("*.ts"))
    (folder / "live.m3u8").write_text(playlist(*parts, end=False))
    (folder / "bad.m3u8").write_text(playlist(*parts, f"file://{folder}/{parts[0]}", end=False))
    with http_server(serving(folder, [])) as port:
        with frames.open(f"http://127.0.0.1:{port}/live.m3u8", timeout=0.5) as source:
            assert source.info.live
            assert next(source).seconds == 0.0
        with pytest.raises(SourceError, match=r"lost, and 0 attempts .*outside its folder"):
            list(frames.open(f"http://127.0.0.1:{port}/bad.m3u8", timeout=0.5, retries=0))
