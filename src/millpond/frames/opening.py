"""`open`: from a path, an address or an iterable to a source. Holds the choice of engine and nothing else."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from millpond.errors import SourceError
from millpond.frames.address import parse, with_credentials
from millpond.frames.arrays import Arrays
from millpond.frames.decoding import Video
from millpond.frames.images import DEFAULT_FPS, Images
from millpond.frames.pipe import Pipe
from millpond.frames.reach import Reach
from millpond.frames.reader import Backoff, Reader, SystemClock
from millpond.frames.sampling import check_fps
from millpond.frames.source import Direct, Event, Feed, Source


def open(
    source: str | os.PathLike[str] | Iterable[Any],
    fps: float | None = None,
    *,
    live: bool | None = None,
    timeout: float = 10.0,
    retries: int = 8,
    allow_hosts: Sequence[str] = (),
    allow_paths: Sequence[str | os.PathLike[str]] = (),
    credentials: tuple[str, str] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Source:
    """Open a source of timestamped frames.

    Args:
        source: a video file; a folder of images or one image; a URL (rtsp, http, tcp, ...); `/dev/video*`; a named pipe; `-` for
            stdin; or an iterable of `Frame` or (seconds, uint8 [H, W, 3] RGB).
        fps: sampling: the first frame at or after each tick k / fps, by the frames' own times; None takes every frame. For a
            folder of images it is the folder's rate (None: 1).
        live: True drops to the latest frame when the consumer is slower; a file or a folder then plays at its own speed, like a
            camera. False gives every frame and does not connect again. None decides: cameras and rtsp, rtmp, rtp, tcp, udp and
            srt are live; so is http where what it serves has no end (motion JPEG, a playlist without a length).
        timeout: seconds without a byte after which a network stream counts as lost.
        retries: attempts in a row to get back a live network stream or camera, with growing pauses (0.5 s to 30 s).
        allow_hosts: hosts (name, or name:port) that a playlist may name beside its own.
        allow_paths: files and folders that a playlist may name beside its own folder.
        credentials: user and password for an address that holds none, so that they need not stand in it.
        on_event: told when a live stream is lost, tried again and back; called in the reading thread.

    Returns:
        A context manager and iterator of `Frame`.

    Raises:
        SourceError: an argument is wrong, or the source cannot be opened.
    """
    check_fps(fps)
    if not (math.isfinite(timeout) and timeout > 0):
        raise SourceError(f"timeout must be a number of seconds above 0, not {timeout}")
    if retries < 0:
        raise SourceError(f"retries must not be negative, not {retries}")
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Iterable):
            raise SourceError(
                f"cannot watch a {type(source).__name__}: give a path, an address, or an iterable of (seconds, uint8 [H, W, 3])"
            )
        frames = Arrays(source, live=bool(live))
        return Source(Reader(lambda: frames, fps=fps) if live else Direct(frames, fps))
    address = parse(source)
    if credentials is not None:
        address = with_credentials(address, *credentials)
    if live is None:
        live = address.live
    clock, paths = SystemClock(), [os.fspath(path) for path in allow_paths]
    may_list_files = address.kind == "file" or address.target.startswith(("http://", "https://"))

    def connect() -> Feed:
        if address.kind == "images":
            return Images(address, fps=DEFAULT_FPS if fps is None else fps, live=bool(live))
        pipe = Pipe(address.target) if address.kind == "pipe" else None
        reach = Reach(address, hosts=allow_hosts, paths=paths, timeout=timeout) if may_list_files else None
        return Video(address, pipe=pipe, live=live, timeout=timeout, now=clock.now, reach=reach)

    if address.kind in ("file", "images"):
        return Source(Reader(connect, fps=fps, paced=True, clock=clock) if live else Direct(connect(), fps))
    # A pipe or a network is read by a thread also where nothing is dropped, so that a wait for bytes can be interrupted.
    again = Backoff(retries) if live is not False and address.kind in ("url", "camera") else None
    return Source(Reader(connect, fps=fps, backoff=again, clock=clock, on_event=on_event))
