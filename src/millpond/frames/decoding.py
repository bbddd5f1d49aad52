"""Decoding with PyAV (FFmpeg): one opened container -> every picture with its own time.

What FFmpeg says about an error may hold the address with its password, so none of its messages is passed on, and no
error of its kind stays attached to ours.
"""

import errno
import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from itertools import chain
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from millpond.errors import SourceError
from millpond.frames.address import Address
from millpond.frames.orientation import Turn, square, upright
from millpond.frames.reach import Reach, Readable
from millpond.frames.sampling import Pending
from millpond.frames.source import SourceInfo
from millpond.frames.timing import StreamTimes

# Demuxers that draw text as a picture: a README is not a video.
_TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})
# Over HTTP these have no end unless they state a length; anything else is a file.
_ENDLESS = frozenset({"hls", "mpjpeg"})
# Demuxers that open what the content of a file names. HLS is read within bounds (`Reach`); FFmpeg opens the parts of the others
# by itself, so nothing is read as one of them.
_REFERRING = frozenset(
    {"avisynth", "concat", "dash", "hls", "imf", "lavfi", "sap", "sdp", "vapoursynth", "vobsub", "webm_dash_manifest"}
)
_PLAYLIST_MARK = b"#EXTM3U"
_HEAD_BYTES = 1 << 16
# Containers without presentation times; what FFmpeg puts there is a guess.
_NO_PRESENTATION = frozenset({"avi"})
# Containers whose stated length can be believed, so that a file that ends long before was cut short.
_STATES_LENGTH = frozenset({"matroska", "mov"})
_NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS
_TIMES_MAY_JUMP = 0x200  # AVFMT_TS_DISCONT
_COVER_ART = av.stream.Disposition.attached_pic
_MOST_PIXELS = 1 << 27  # 16K video; a damaged header may claim more than any memory holds
_PIPE_HINT = "; an MP4 can be piped only if its index is in front (faststart) or it is fragmented"
_PLAUSIBLE_FPS = (1e-3, 1000.0)


class Bytes(Readable, Protocol):
    """A file object without `seek`: what a pipe can do."""

    def cancel(self) -> None:
        """Make `read` return b"" soon; any thread may call it."""


class Video:
    """One opened container and its video stream, decoded as it is iterated. A `Feed`.

    Args:
        address: what to open.
        pipe: read from this instead of opening the target.
        live: frames come as they happen; None decides by what was opened.
        timeout: seconds without a byte after which a network stream counts as lost.
        reach: opens what a playlist names; None reads no playlist.
        now: the arrival clock, seconds; used only for live streams whose format carries no times (HTTP motion JPEG).

    Raises:
        SourceError: it cannot be opened, holds no video, or not one picture of it can be decoded.
    """

    def __init__(
        self,
        address: Address,
        *,
        pipe: Bytes | None = None,
        live: bool | None,
        timeout: float,
        now: Callable[[], float],
        reach: Reach | None = None,
    ) -> None:
        self._name = address.name
        self._pipe = pipe
        self._reach = reach
        self._cancelled = False
        self.damaged = 0
        self._reformatter = VideoReformatter()
        self._turn = Turn()
        self._pictures: Iterator[Pending] = iter(())
        try:
            self._container = _open_container(address, pipe, live, timeout, reach)
        except BaseException:
            if pipe is not None:
                pipe.close()
            raise
        try:
            stream = self._stream = _pick_stream(self._container, address.name)
            rate = _plausible(stream.average_rate) or _plausible(stream.guessed_rate)
            formats = set(self._container.format.name.split(","))
            length = _seconds(stream.duration, stream.time_base)
            if length is None and (len(self._container.streams) == 1 or not formats & _STATES_LENGTH):
                length = _seconds(self._container.duration, 1 / av.time_base)
            self._length = length if formats & _STATES_LENGTH else None
            if live is None:
                live = bool(formats & _ENDLESS) and length is None
            self._live = live
            # Broadcasts are made to lose packets, and joining two recordings looks like a loss: counted, but no fault.
            self._lossy = live or "mpegts" in formats
            flags = self._container.format.flags
            self._times = StreamTimes(
                step=1 / (rate or 25.0),
                jumps=live or bool(flags & _TIMES_MAY_JUMP),
                now=now if live and flags & _NO_TIMESTAMPS else None,
            )
            self._times.by_decoding = bool(formats & _NO_PRESENTATION)
            codec = stream.codec_context
            width, height = codec.width or None, codec.height or None
            if width and height:
                width, height = square(width, height, stream.sample_aspect_ratio)
            # Slices keep the delay low; whole frames in parallel decode a file fastest.
            stream.thread_type = "SLICE" if live else "AUTO"
            self._pictures = self._decode()
            if not live:
                # A file says at once whether it can be decoded, and which way up its pictures are.
                first = next(self._pictures, None)
                if first is not None:
                    height, width = first.render().shape[:2]
                    self._pictures = chain([first], self._pictures)
            self.info = SourceInfo(
                name=address.name,
                kind=address.kind,
                live=live,
                codec=codec.codec.name,
                width=width,
                height=height,
                fps=rate,
                duration=None if live else length,
            )
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Pending]:
        return self._pictures

    def cancel(self) -> None:
        self._cancelled = True
        if self._pipe is not None:
            self._pipe.cancel()

    def close(self) -> None:
        self._cancelled = True
        self._pictures = iter(())  # what was decoded ahead of its turn goes as well
        self._container.close()
        if self._pipe is not None:
            self._pipe.close()

    def _decode(self) -> Iterator[Pending]:
        """Pictures in order of time; then, for a file, SourceError if it is not whole."""
        good = 0
        end: float | None = None
        unordered = True  # every packet is stated to be shown when it is decoded
        for packet in self._packets():
            if self._cancelled or (self._live and self._reach is not None and self._reach.fault is not None):
                break
            if packet is not None and packet.pts is not None:
                unordered &= packet.pts == packet.dts
            pictures, broken = self._decode_packet(packet)
            # A recording cut in the middle of a group, or a camera joined there, begins with pictures that cannot be
            # decoded. That is no damage.
            self.damaged += bool(broken and (good or packet is None))
            for picture in pictures:
                if not good and unordered and self._stream.codec_context.has_b_frames:
                    self._times.by_decoding = True  # yet the decoder puts them in order: the file does not say how
                seconds = None if picture.is_corrupt else self._times.place(*self._stated(picture))
                if seconds is None:
                    self.damaged += bool(good)
                    continue
                good += 1
                end = seconds + float((picture.duration or 0) * self._stream.time_base)
                yield Pending(seconds, partial(self._render, picture))
        if self._cancelled:
            return
        if self._reach is not None and self._reach.fault is not None:
            raise self._reach.fault
        if not self._live:
            self._judge(good, end)
        elif self._fault:
            raise SourceError(f"{self._name} broke: {self._fault}")

    def _stated(self, picture: Any) -> tuple[float | None, float | None]:
        """When to show a picture, and the decoding time of what made the decoder give it out; seconds of the container."""
        unit = self._stream.time_base
        pts, dts = picture.pts, picture.dts
        return None if pts is None else float(pts * unit), None if dts is None else float(dts * unit)

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, then None to flush the decoder; a fault of the container is kept for the end."""
        self._fault = ""
        with closing(self._container.demux(self._stream)) as packets:
            while True:
                try:
                    packet = next(packets, None)
                except (av.FFmpegError, OSError) as error:
                    self._fault, packet = _reason(error, None), None
                if packet is None or (packet.size == 0 and packet.dts is None):
                    break  # the end, or PyAV's own mark of it
                if packet.size:  # an empty one would tell the decoder that the stream has ended
                    yield packet
        yield None

    def _decode_packet(self, packet: Any) -> tuple[list[Any], bool]:
        # Frame threads would lose the good pictures before a packet that is known to be incomplete, so it stays out.
        if packet is not None and packet.is_corrupt and not self._lossy:
            return [], True
        try:
            return self._stream.codec_context.decode(packet), False
        except av.EOFError:
            return [], False
        except (av.FFmpegError, ValueError):
            return [], True

    def _judge(self, good: int, end: float | None) -> None:
        """Raise for a file that ended before its end, or had holes. What could be decoded has been given out."""
        if good == 0:
            fault = self._fault or "the data are damaged, or the codec is not supported"
            hint = _PIPE_HINT if self._pipe is not None else ""
            raise SourceError(f"not one picture of {self._name} can be decoded: {fault}{hint}")
        until = f"after {self._times.last or 0.0:.2f} s"
        if self._fault:
            raise SourceError(f"{self._name} broke {until}: {self._fault}")
        if self._length is not None and end is not None:
            missing = self._length - end
            if missing > max(0.5, 2 * self._times.step):
                raise SourceError(f"{self._name} ends {until}, but should last {self._length:.2f} s: it was cut short")
        if self.damaged and not self._lossy:
            raise SourceError(
                f"{self._name} is damaged: {self.damaged} of its pictures could not be decoded; the others are good"
            )

    def _render(self, picture: Any) -> NDArray[np.uint8]:
        try:
            width, height = square(picture.width, picture.height, self._stream.sample_aspect_ratio)
            converted: Any = self._reformatter.reformat(picture, width, height, "rgb24")
            return upright(converted.to_ndarray(), self._turn.of(picture))
        except (av.FFmpegError, ValueError) as error:
            fault = _reason(error, None)
        raise SourceError(f"a picture of {self._name} cannot be turned into RGB: {fault}")


def _open_container(
    address: Address, pipe: Bytes | None, live: bool | None, timeout: float, reach: Reach | None
) -> Any:
    options = {"format_whitelist": _self_contained()}
    form, target, limits = None, address.target, None
    if address.kind == "camera":
        form = "v4l2"
    elif address.kind == "url":
        limits = (timeout, timeout)
        if live:
            options["analyzeduration"] = "2000000"  # microseconds: begin sooner than the usual 5 s
        if target.startswith("rtsp"):
            options["rtsp_flags"] = "prefer_tcp"  # UDP is lost at many a firewall without a word
    elif pipe is not None:
        options["protocol_whitelist"] = "data"
    else:
        target = f"file:{target}"  # so that a colon in a name is not taken for a protocol
    referring = False
    try:
        return av.open(
            target if pipe is None else pipe, format=form, options=options, timeout=limits, metadata_errors="replace"
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        referring = getattr(error, "errno", None) == errno.EINVAL  # what it is, is not on the list
        fault = _reason(error, timeout)
    if referring and reach is not None:
        return _open_playlist(target, address.name, reach, timeout)
    raise SourceError(f"cannot open {address.name}: {fault}{_PIPE_HINT if pipe is not None else ''}")


def _open_playlist(target: str, name: str, reach: Reach, timeout: float) -> Any:
    """Open a playlist of HLS, all of whose files come through `reach`."""
    file = reach.open(target)
    try:
        head = file.read(_HEAD_BYTES)
    finally:
        file.close()
    if re.search(rb"^#EXT-X-KEY:METHOD=(?!NONE)", head, re.MULTILINE):
        raise SourceError(f"the playlist {name} is encrypted, which is not read")
    if not head.startswith(_PLAYLIST_MARK):
        raise SourceError(f"cannot open {name}: it is not a video, or it is a list of files of another kind than HLS")
    # To keep a connection for the next file, FFmpeg would open that one by itself.
    options = {"http_persistent": "0", "http_multiple": "0", "protocol_whitelist": "file,http,https,tcp,tls,data"}
    fault = ""
    try:
        return av.open(
            target, format="hls", options=options, timeout=(timeout, timeout), metadata_errors="replace", io_open=reach
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        fault = _reason(error, timeout)
    raise reach.fault or SourceError(f"cannot open {name}: {fault}")


@cache
def _self_contained() -> str:
    """The names of the demuxers that read one file and nothing else, for FFmpeg's `format_whitelist`."""
    return ",".join(sorted(av.formats_available - _REFERRING))


def _pick_stream(container: Any, name: str) -> Any:
    if container.format.name in _TEXT_ART:
        raise SourceError(f"cannot open {name}: it is a text, not a video")
    films = [s for s in container.streams.video if not s.disposition & _COVER_ART and s.codec_context]
    if not films:
        kinds = {stream.type for stream in container.streams}
        raise SourceError(f"cannot watch {name}: it holds {'only sound' if 'audio' in kinds else 'no video'}")
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
    return stream


def _seconds(ticks: int | None, unit: Any) -> float | None:
    if ticks is None or unit is None or ticks <= 0:
        return None
    return float(ticks * unit)


def _plausible(rate: Any) -> float | None:
    minimum, most = _PLAUSIBLE_FPS
    return float(rate) if rate and math.isfinite(rate) and minimum <= rate <= most else None


def _reason(error: Exception, timeout: float | None) -> str:
    """Why, in words that cannot hold an address."""
    if isinstance(error, av.error.ExitError):
        return "no data came" + (f" for {timeout:g} s" if timeout else " in time")
    if isinstance(error, av.error.ProtocolNotFoundError):
        return "the FFmpeg inside PyAV was built without this kind of address"
    if isinstance(error, av.error.InvalidDataError):
        return "it is damaged, or not a video"
    text = getattr(error, "strerror", None)
    return str(text) if text else type(error).__name__
