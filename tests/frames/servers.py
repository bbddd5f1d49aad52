"""Small servers on the loopback: bytes over TCP, files over HTTP, motion JPEG, RTSP."""

import base64
import http.server
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
from PIL import Image

from tests.frames.media import gray, noise, write


class ByteServer:
    """Sends the same bytes to every client, then closes or holds the line.

    Args:
        hold: keep the connection open after the bytes, until the server is closed.
        port: 0 for any.
    """

    def __init__(self, content: bytes, *, hold: bool = False, port: int = 0) -> None:
        self._content, self._hold = content, hold
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.clients = 0
        self._lines: list[socket.socket] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            self.clients += 1
            self._lines.append(line)
            threading.Thread(target=self._send, args=(line,), daemon=True).start()

    def _send(self, line: socket.socket) -> None:
        with suppress(OSError):  # the client went first
            line.sendall(self._content)
            if self._hold:
                self._closed.wait()
            line.shutdown(socket.SHUT_RDWR)
        line.close()

    def close(self) -> None:
        self._closed.set()
        # Only a shutdown wakes a thread that is in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            line.close()
        self._thread.join()

    def __enter__(self) -> "ByteServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def http_server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """Serve GET with `answer`; gives the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client went first
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send_file(path: Path, *, length: int | None = None) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """The whole file, without ranges; `length` is what the header claims."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        content = path.read_bytes()
        request.send_response(200)
        request.send_header("Content-Type", "video/mp4")
        request.send_header("Content-Length", str(length or len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def motion_jpeg(count: int) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """As cheap cameras do it: a multipart answer of JPEGs."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        request.end_headers()
        for index in range(count):
            picture = io.BytesIO()
            Image.fromarray(gray(index)).save(picture, "JPEG")
            body = picture.getvalue()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
            request.wfile.write(head.encode() + body + b"\r\n")

    return answer


class _Packets:
    """A file for FFmpeg's RTP muxer, which writes one packet at a time."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.sent.append(bytes(data))
        return len(data)


def rtp_packets(folder: Path, count: int) -> list[bytes]:
    """H.264 at 10 frames a second in RTP (and RTCP) packets, payload type 96."""
    options = {"g": "10", "bf": "0", "x264-params": "repeat-headers=1"}
    path = write(folder / "rtp.ts", noise(count), options=options)
    packets = _Packets()
    with av.open(str(path)) as source, av.open(packets, "w", format="rtp", buffer_size=1400) as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                sink.mux(packet)
    return packets.sent


class RtspServer(ByteServer):
    """A camera that speaks RTSP with the media interleaved in the same connection (RFC 2326, section 10.12).

    Args:
        packets: RTP and RTCP packets, sent on PLAY; the line is closed after them.
        credentials: what a client must send (RFC 7617), as user:password; empty for none.
    """

    SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:track0\r\n"

    def __init__(self, packets: list[bytes], *, credentials: str = "") -> None:
        self._packets = packets
        self._expected = "Basic " + base64.b64encode(credentials.encode()).decode() if credentials else ""
        super().__init__(b"")

    def _send(self, line: socket.socket) -> None:
        with suppress(OSError), line.makefile("rb") as requests:
            while head := self._request(requests):
                verb, headers = head
                answer, body = f"RTSP/1.0 200 OK\r\nCSeq: {headers.get('cseq', '0')}\r\n", ""
                if self._expected and headers.get("authorization") != self._expected:
                    answer = answer.replace("200 OK", "401 Unauthorized") + 'WWW-Authenticate: Basic realm="camera"\r\n'
                elif verb == "DESCRIBE":
                    body = self.SDP
                    answer += f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
                elif verb == "SETUP":
                    answer += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
                elif verb == "PLAY":
                    answer += "Session: 1\r\n"
                line.sendall((answer + "\r\n" + body).encode())
                if verb == "PLAY":
                    for packet in self._packets:
                        control = 200 <= packet[1] <= 204  # RTCP goes on the odd channel
                        line.sendall(b"$" + bytes([control]) + len(packet).to_bytes(2, "big") + packet)
                    line.shutdown(socket.SHUT_RDWR)
                    break
        line.close()

    @staticmethod
    def _request(requests: io.BufferedIOBase) -> tuple[str, dict[str, str]] | None:
        verb = requests.readline().decode().partition(" ")[0]
        headers: dict[str, str] = {}
        while text := requests.readline().decode().strip():
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        return (verb, headers) if verb else None
