"""Snapshots as a stranger would write them, and what is said of them."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from millpond import Session, SnapshotError
from millpond.models.base import Family

START = len(b'{"__metadata__":{"checksum":"') + 8


def refused(path: Path, family: Family, **arguments: Any) -> str:
    """The one line; of what a stranger's file says, nothing that a terminal obeys."""
    with pytest.raises(SnapshotError) as caught:
        Session.load(path, family, **arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    return line


def parts(whole: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, session and payload."""
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["session"]), whole[8 + size :]


def sealed(header: dict[str, Any], session: Any, payload: bytes, version: int = 1) -> bytes:
    """A file as somebody would forge it: with the right checksum."""
    tensors = {name: row for name, row in header.items() if name != "__metadata__"}
    meta = {
        "checksum": "0" * 64,
        "format": "millpond-snapshot",
        "version": str(version),
        "session": json.dumps(session),
    }
    text = json.dumps({"__metadata__": meta, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = struct.pack("<Q", len(text)) + text + payload
    return whole[:START] + hashlib.sha256(whole).hexdigest().encode() + whole[START + 64 :]
