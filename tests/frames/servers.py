"""Small servers on the loopback: bytes over TCP, files over HTTP, motion JPEG."""

import http.server
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from tests.frames.media import gray


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
