"""What a playlist may open: files of its own folder, addresses of its own host, and what the caller allows by name.

A playlist is a list of other files, written by whoever made it: followed blindly, one that was sent to you reads any file of yours
and one from the network asks any address that only your machine can reach. FFmpeg therefore gets every file of a playlist from here.
"""

import base64
import http.client
import io
import os
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

from millpond.errors import SourceError
from millpond.frames.address import Address, redacted
from millpond.printable import printable

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Readable(Protocol):
    """What FFmpeg reads from."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Reach:
    """Opens what a playlist names, within bounds; it is the `io_open` of PyAV.

    Args:
        address: of the playlist itself, a file or http(s).
        hosts: other hosts that may be asked: a name, or name:port.
        paths: other files and folders that may be read.
        timeout: seconds without an answer.

    Attributes:
        fault: the first part that could not be had: outside the bounds (names what to allow), encrypted, or not there.
    """

    def __init__(self, address: Address, *, hosts: Sequence[str], paths: Sequence[str], timeout: float) -> None:
        self.name, self._timeout = address.name, timeout
        self._hosts = frozenset(host.lower() for host in hosts)
        self._folders = [os.path.realpath(path) for path in paths]
        self._own: tuple[str, int] | None = None
        self._login = ""
        if address.kind == "url":
            parts = urllib.parse.urlsplit(address.target)
            self._own, self._login = _host(parts), _login(parts)
        else:
            self._folders.append(os.path.dirname(os.path.realpath(address.target)))
        self._opener = urllib.request.build_opener(_Redirects(self))
        self.fault: SourceError | None = None

    def __call__(self, url: str, flags: int, options: dict[str, str]) -> Readable:
        """For FFmpeg, which would give up the whole list on an error: a part that cannot be had is empty, and kept in `fault`."""
        try:
            return self.open(url, options)
        except SourceError as error:
            self.fault = self.fault or error
            return io.BytesIO()

    def open(self, url: str, options: Mapping[str, str] = MappingProxyType({})) -> Readable:
        """Open one file for reading; raises SourceError."""
        scheme, mark, _ = url.partition(":")
        if mark and scheme.lower() in _DEFAULT_PORTS:
            return self._fetch(url, options)
        if mark and scheme != "file" and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
            why = "is encrypted" if scheme.startswith("crypto") else f"names a {printable(scheme)}: address"
            raise SourceError(f"the playlist {self.name} {why}, which is not read")
        return self._read(re.sub(r"^file:(//(?=/))?", "", url))

    def _read(self, name: str) -> BinaryIO:
        path, fault = os.path.realpath(name), ""
        if not any(os.path.commonpath([path, folder]) == folder for folder in self._folders):
            raise SourceError(
                f"the playlist {self.name} asks for {printable(path)}, which is outside its folder: it is read only if it is "
                "allowed by name (allow_paths, --allow-path)"
            )
        try:
            # Not to block: a named pipe would wait for a writer.
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return os.fdopen(handle, "rb")
            os.close(handle)
            fault = "not a file"
        except OSError as error:
            fault = error.strerror or type(error).__name__
        raise SourceError(f"cannot open {printable(path)} of the playlist {self.name}: {fault}")

    def check(self, url: str) -> urllib.parse.SplitResult:
        """Raise SourceError unless this address may be asked."""
        parts = urllib.parse.urlsplit(url)
        host = _host(parts)
        if host is None or not (self._same(host) or self._hosts & {host[0], f"{host[0]}:{host[1]}"}):
            named = "an address" if host is None else f"{host[0]}:{host[1]}"
            raise SourceError(
                f"the playlist {self.name} asks for {printable(named)}, which is not its own host: it is asked only if it is "
                "allowed by name (allow_hosts, --allow-host)"
            )
        return parts

    def _same(self, host: tuple[str, int]) -> bool:
        ports = set(_DEFAULT_PORTS.values())
        return self._own == host or (
            self._own is not None and self._own[0] == host[0] and {self._own[1], host[1]} <= ports
        )

    def _fetch(self, url: str, options: Mapping[str, str]) -> "_Body":
        try:
            parts = self.check(url)
            fault = ""
        except ValueError:
            fault = "it is no address"
        if fault:
            raise SourceError(f"the playlist {self.name} names a file wrongly: {fault}")
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        request = urllib.request.Request(plain, headers={"User-Agent": "millpond"})
        login = _login(parts) or (self._login if _host(parts) == self._own else "")
        if login:
            # Unredirected: whoever is asked next does not get it.
            token = base64.b64encode(login.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        first, end = int(options.get("offset") or 0), int(options.get("end_offset") or 0)
        if first or end:
            request.add_header("Range", f"bytes={first}-{end - 1 if end else ''}")
        try:
            return _Body(self._opener.open(request, timeout=self._timeout), self)
        except urllib.error.HTTPError as error:
            fault = f"the server answered {error.code}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            fault = getattr(reason, "strerror", None) or type(reason).__name__
        raise SourceError(f"cannot open {printable(redacted(plain))}: {fault}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows only to where the playlist itself could have pointed."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        self._reach.check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Body:
    """What a server sends, without seeking."""

    def __init__(self, answer: Any, reach: Reach) -> None:
        self._answer, self._reach = answer, reach

    def read(self, size: int, /) -> bytes:
        try:
            return bytes(self._answer.read(size))
        except (OSError, http.client.HTTPException) as error:
            fault = getattr(error, "strerror", None) or type(error).__name__
        self._reach.fault = self._reach.fault or SourceError(f"a part of {self._reach.name} broke: {fault}")
        return b""

    def close(self) -> None:
        self._answer.close()


def _host(parts: urllib.parse.SplitResult) -> tuple[str, int] | None:
    """Name and port; None where there is none. Raises ValueError for a port that is no number."""
    if not parts.hostname or parts.scheme not in _DEFAULT_PORTS:
        return None
    return parts.hostname.lower(), parts.port or _DEFAULT_PORTS[parts.scheme]


def _login(parts: urllib.parse.SplitResult) -> str:
    """user:password of an address; empty without."""
    if parts.username is None:
        return ""
    return f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
