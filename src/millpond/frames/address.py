"""What a source string means, and how to name it without giving away a secret. Opens nothing."""

import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from millpond.errors import SourceError
from millpond.printable import printable

Kind = Literal["file", "images", "url", "camera", "pipe", "frames"]

# Schemes of streams that come as they happen; http and https are files unless what they serve has no end.
_LIVE_SCHEMES = frozenset({"rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp"})
_FILE_SCHEMES = frozenset({"http", "https"})
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Address:
    """Where frames come from.

    Attributes:
        kind: how to open it.
        target: the exact path or URL; it may hold credentials, so it is never shown.
        name: what messages and logs may say.
        live: frames come as they happen; None where only the opened stream can tell (http).
    """

    kind: Kind
    target: str = field(repr=False)
    name: str
    live: bool | None = False


def parse(source: str | os.PathLike[str]) -> Address:
    """Read a source string or path.

    Raises:
        SourceError: nothing is there, or the scheme is not one that can be read.
    """
    if isinstance(source, str):
        if not source:
            raise SourceError("the source is empty: name a file, an address, or - for stdin")
        if source == "-":
            return Address("pipe", "-", "stdin")
        scheme, mark, rest = source.partition("://")
        if mark and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            return _parse_url(scheme.lower(), rest)
    return _parse_path(Path(source))


def _parse_url(scheme: str, rest: str) -> Address:
    if scheme == "file":
        return _parse_path(Path(rest))
    if scheme in _LIVE_SCHEMES | _FILE_SCHEMES:
        live = True if scheme in _LIVE_SCHEMES else None
        return Address("url", f"{scheme}://{rest}", printable(redacted(f"{scheme}://{rest}")), live)
    schemes = ", ".join(f"{known}://" for known in sorted(_LIVE_SCHEMES | _FILE_SCHEMES))
    raise SourceError(
        f"{printable(scheme)}:// is not a kind of address that can be watched: use a file, or one of {schemes}"
    )


def with_credentials(address: Address, user: str, password: str) -> Address:
    """The same address with a user and a password in its target, which is never shown.

    Raises:
        SourceError: it is no network address, or holds a user already.
    """
    scheme, mark, rest = address.target.partition("://")
    if address.kind != "url" or not mark:
        raise SourceError(f"credentials are for network addresses, and {address.name} is none")
    if "@" in re.split(r"[/?#\\]", rest, maxsplit=1)[0]:
        raise SourceError(
            f"the address {address.name} holds a user already: leave it out there, or give no credentials"
        )
    return replace(address, target=f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}")


def _parse_path(path: Path) -> Address:
    target, name = str(path), printable(str(path))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = None
    if mode is None:
        # It may be a mistyped URL, with a password in it.
        if "@" in name or "?" in name:
            raise SourceError("no such file (it may be a URL, so it is not repeated here): a URL needs its ://")
        raise SourceError(f"no such file or folder: {name}")
    if stat.S_ISDIR(mode):
        return Address("images", target, name)
    if stat.S_ISCHR(mode) and re.fullmatch(r"/dev/video\d+", target):
        return Address("camera", target, name, live=True)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return Address("pipe", target, name)
    return Address("images" if path.suffix.lower() in IMAGE_SUFFIXES else "file", target, name)


def redacted(url: str) -> str:
    """A URL without its user, password, query, fragment and whatever else may be a secret.

    What cannot be told apart (a password with a slash, say) is hidden as a whole. Rather too little than too much.
    """
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    if "@" in tail or "%40" in rest.lower():
        return f"{scheme}://…"
    host = authority.rpartition("@")[2]
    if scheme.startswith("rtmp"):
        return f"{scheme}://{host}/…"  # the path of RTMP holds the key of the stream
    path = re.split(r"[?#;]", tail, maxsplit=1)[0]
    # Some servers take a signature as a part of the path.
    parts = ["…" if re.search(r"[=~]|%3d", part, re.IGNORECASE) else part for part in path.split("/")]
    return f"{scheme}://{host}{'/'.join(parts)}"
