"""What a source string means, and that its secrets stay in it."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millpond import frames
from millpond.errors import SourceError
from millpond.frames.address import parse, redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://cam.local:554/stream1", "rtsp://cam.local:554/stream1"),
        ("rtsp://admin:hunter2@10.0.0.7/ch0", "rtsp://10.0.0.7/ch0"),
        ("http://example.org/a/b.mp4?token=abc&x=1", "http://example.org/a/b.mp4"),
        ("http://example.org/b.mp4#key", "http://example.org/b.mp4"),
        ("http://key@example.org/b.mp4", "http://example.org/b.mp4"),
        ("http://example.org/hdnea=exp~sig/b.m3u8", "http://example.org/…/b.m3u8"),
        ("http://example.org/b.mp4;session=4", "http://example.org/b.mp4"),
        ("rtmp://live.example.org/app/STREAMKEY", "rtmp://live.example.org/…"),
        ("rtsp://u:p@ss/word@host/x", "rtsp://…"),
        ("rtsp://u:pw%40host", "rtsp://…"),
        ("tcp://127.0.0.1:9000", "tcp://127.0.0.1:9000"),
        ("http://[::1]:8000/a.mp4", "http://[::1]:8000/a.mp4"),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    assert redacted(url) == shown


secrets = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1, max_size=12)


@given(secrets, secrets)
@example("a/b", "c?d")
@example("a?b", "c#d")
@example("a@b", "c/@")
@example("\\", "%40")
def test_no_password_survives_whatever_is_in_it(user: str, password: str) -> None:
    shown = redacted(f"rtsp://{user}Q1W2{password}:Z9X8{password}V7@host/path")
    assert "Q1W2" not in shown
    assert "Z9X8" not in shown
    assert "V7" not in shown


@given(secrets, secrets)
def test_no_query_survives(name: str, value: str) -> None:
    shown = redacted(f"https://host/clip.mp4?{name}=Z9X8{value}&token=Q1W2")
    assert "Z9X8" not in shown
    assert "Q1W2" not in shown


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "rtmp", "rtp", "tcp", "udp", "srt"])
def test_streams_are_live(scheme: str) -> None:
    address = parse(f"{scheme.upper()}://host:1/x")
    assert (address.kind, address.live, address.target) == ("url", True, f"{scheme}://host:1/x")


def test_http_decides_when_it_is_opened() -> None:
    assert parse("http://host/clip.mp4").live is None


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.JPG").touch()
    os.mkfifo(tmp_path / "fifo")
    assert parse(tmp_path / "a.mp4").kind == "file"
    assert parse(str(tmp_path / "a.mp4")).kind == "file"
    assert parse(f"file://{tmp_path}/a.mp4").kind == "file"
    assert parse(tmp_path / "a.JPG").kind == "images"
    assert parse(tmp_path).kind == "images"
    assert parse(tmp_path / "fifo").kind == "pipe"
    assert parse("-").kind == "pipe"


def test_a_scheme_that_cannot_be_read_names_those_that_can() -> None:
    with pytest.raises(SourceError, match=r"gopher://.*rtsp://") as caught:
        parse("gopher://user:hunter2@host/x?token=abc")
    assert "hunter2" not in str(caught.value)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("text", ["rtsp:/admin:hunter2@cam/1", "admin:hunter2@cam", "http:/cam/x?token=hunter2"])
def test_a_mistyped_address_is_not_repeated(text: str) -> None:
    with pytest.raises(SourceError, match="URL") as caught:
        parse(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("path", "message"), [("", "empty"), ("no/such/file.mp4", "no such"), ("a\0b", "no such")])
def test_a_missing_file(path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse(path)


@pytest.mark.parametrize("name", ["a\x1b]0;owned\x07.mp4", "b\n.mp4", "c\x9b2J.mp4", "d\udcff.mp4"])
def test_a_name_cannot_steer_the_terminal(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError) as missing:
        parse(tmp_path / name)
    (tmp_path / name).touch()
    assert parse(tmp_path / name).target == str(tmp_path / name)
    for shown in (parse(tmp_path / name).name, str(missing.value)):
        assert shown.isprintable()


def test_the_target_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(parse("rtsp://admin:hunter2@cam/1"))


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if str(path) == "/dev/video9":
            path = Path(os.devnull)  # a character device, as a camera is
        return plain(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    address = parse("/dev/video9")
    assert (address.kind, address.live) == ("camera", True)
    with pytest.raises(SourceError, match=r"cannot open /dev/video9: No such file"):
        frames.open("/dev/video9")
