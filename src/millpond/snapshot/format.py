"""The file: a safetensors container that is written and read in pieces, sealed by one checksum.

    8 bytes    N, length of the header, little-endian
    N bytes    {"__metadata__": {"checksum", "format", "version", "session"}, NAME: {"dtype", "shape", "data_offsets"}, ...}
    the rest   the tensors, one behind the other

`session` is JSON in a string. `checksum`, at a fixed place, is the SHA-256 of the whole file with its own 64 digits read as zeros, so no
byte can differ unnoticed. Nothing that the file says is believed before its size has borne it out. Knows nothing about sessions.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from millpond.errors import SnapshotError
from millpond.precision.tensor_file import DTYPES, Entry
from millpond.printable import printable
from millpond.snapshot.replacing import Writer, replacing

VERSION = 1
_BEGIN = b'{"__metadata__":{"checksum":"'
_DIGITS = 64
_NEXT = b'","format":"millpond-snapshot","version":"'
_SEAL = 8 + len(_BEGIN)
# Far above any header there is, and small enough to be read whole.
_MOST_HEADER = 16 << 20
_MOST_AXES, _MOST_BYTES = 8, 1 << 56
_PIECE = 1 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Stored = Tensor | np.ndarray


def write(path: str | os.PathLike[str], session: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Put a snapshot in the place of `path`, whole or not at all; beside the tensors a piece of one is in memory.

    Args:
        session: plain values. tensors: on any device, views as they are.

    Raises:
        SnapshotError: it cannot be written; what was there stays.
    """
    # The widest first: then each is aligned for whoever maps the file.
    order = sorted(tensors, key=lambda name: -_itemsize(tensors[name]))
    header = _header(session, {name: tensors[name] for name in order})
    digest = hashlib.sha256()
    with replacing(path) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(header).to_bytes(8, "little"))
        put(header)
        for name in order:
            for piece in _pieces(tensors[name]):
                put(piece)
        _seal(file, digest.hexdigest())


def _seal(file: Writer, digest: str) -> None:
    file.overwrite(_SEAL, digest.encode())


def _header(session: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bytes:
    written = json.dumps(json.dumps(session, allow_nan=False))
    head = _BEGIN + b"0" * _DIGITS + _NEXT + f'{VERSION}","session":{written}}}'.encode()
    at, parts = 0, [head]
    for name, stored in tensors.items():
        dtype = "U8" if isinstance(stored, np.ndarray) else _NAMES[stored.dtype]
        last = at + prod(stored.shape) * _itemsize(stored)
        row = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [at, last]}
        parts.append(f",{json.dumps(name)}:{json.dumps(row)}".encode())
        at = last
    header = b"".join([*parts, b"}"])
    header += b" " * (-len(header) % 8)
    if len(header) > _MOST_HEADER:
        raise SnapshotError(f"the session's description takes {len(header)} bytes, more than {_MOST_HEADER}")
    return header


def _itemsize(stored: Stored) -> int:
    return stored.dtype.itemsize


def _pieces(stored: Stored) -> Iterator[memoryview]:
    """The bytes of a tensor in order, a piece at a time; of a view of a larger one no copy is made beyond a piece."""
    if isinstance(stored, np.ndarray):
        for row in stored if stored.size else ():
            yield memoryview(cast(Any, np.ascontiguousarray(row))).cast("B")
        return
    for run in _runs(stored.detach()):
        for part in run.split(max(1, _PIECE // run.element_size())):
            yield memoryview(cast(Any, part.cpu().view(torch.uint8).numpy()))


def _runs(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as the longest one-dimensional views that lie in one run, in order."""
    if not tensor.numel():
        return
    if tensor.is_contiguous() or tensor.dim() < 2:
        yield tensor.reshape(-1)
        return
    for part in tensor:
        yield from _runs(part)


class Snapshot:
    """A file that has been found whole: what it says, and where its tensors lie.

    Attributes:
        name: of the file, to be printed. session: the plain values. entries: of the tensors, by name.
    """

    def __init__(self, file: BinaryIO, name: str, session: dict[str, Any], entries: dict[str, Entry]) -> None:
        self._file, self.name = file, name
        self.session, self.entries = session, entries

    def rows(self, name: str, columns: int) -> int:
        """How many rows a tensor of so many columns has; a file of their size is there.

        Raises:
            SnapshotError: it is none.
        """
        entry = self.entries.get(name)
        if entry is None or len(entry.shape) != 2 or entry.shape[1] != columns:
            raise self.damaged(f"{name} has not {columns} columns")
        return entry.shape[0]

    def damaged(self, why: str) -> SnapshotError:
        """What to raise of a file that says what cannot be."""
        return SnapshotError(f"{self.name} is no snapshot that can be resumed: {why}")

    def read(self, name: str, into: Stored) -> None:
        """Copy a tensor out of the file into its place, a piece at a time.

        Raises:
            SnapshotError: it is not there, or of another dtype or shape.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.damaged(f"it lacks {name}")
        dtype = torch.uint8 if isinstance(into, np.ndarray) else into.dtype
        if (entry.dtype, entry.shape) != (dtype, tuple(into.shape)):
            raise self.damaged(
                f"{name} is {_NAMES[entry.dtype]} {list(entry.shape)}, not {_NAMES[dtype]} {list(into.shape)}"
            )
        self._file.seek(entry.first)
        for run in _runs(torch.from_numpy(into) if isinstance(into, np.ndarray) else into):
            for part in run.split(max(1, _PIECE // run.element_size())):
                there = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
                self._fill(memoryview(cast(Any, there.view(torch.uint8).numpy())))
                if there is not part:
                    part.copy_(there)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = cast(Any, self._file).readinto(view)
            if not count:
                raise self.damaged("it is cut off")
            view = view[count:]


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Snapshot]:
    """A snapshot, held to its checksum before anything in it is believed.

    Raises:
        SnapshotError: there is none, it is damaged, or of a newer format.
    """
    try:
        name = printable(os.fspath(path))
    except TypeError:
        raise SnapshotError(f"a snapshot is named by a path, not {path!r}") from None
    try:
        # A pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            yield _checked(file, name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SnapshotError(f"cannot read the snapshot {name}: {reason}") from error


def _checked(file: BinaryIO, name: str) -> Snapshot:
    """Raises: SnapshotError, and what the system refuses."""

    def no_snapshot(why: str) -> SnapshotError:
        return SnapshotError(f"{name} is not a whole snapshot: {why}")

    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise no_snapshot("it is no file")
    total, start = status.st_size, file.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > min(total - 8, _MOST_HEADER):
        raise no_snapshot("it is cut off, or something else")
    header = file.read(size)
    version = _version(header)
    if version is None:
        raise no_snapshot("it is something else, or damaged")
    if _digest(file, start, header) != header[len(_BEGIN) : len(_BEGIN) + _DIGITS]:
        also = f", or of a newer format ({version})" if version > VERSION else ""
        raise no_snapshot(f"it is damaged{also}: its checksum differs")
    if version > VERSION:
        raise SnapshotError(
            f"{name} was written by a newer millpond: it is of format {version}, and this one reads {VERSION}"
        )
    try:
        read = _parse(header)
        session = _parse(read.pop("__metadata__")["session"])
        entries = {key: _entry(row, 8 + size) for key, row in read.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise no_snapshot(f"its header says what cannot be ({error})") from error
    at = 8 + size
    for entry in sorted(entries.values(), key=lambda entry: (entry.first, entry.last)):
        if entry.first != at:
            raise no_snapshot("its tensors overlap or leave gaps")
        at = entry.last
    if at != total:
        raise no_snapshot("it is longer or shorter than it says")
    return Snapshot(file, name, session, entries)


def _version(header: bytes) -> int | None:
    """The format; None where the header is none of ours."""
    at = len(_BEGIN) + _DIGITS
    if not header.startswith(_BEGIN) or not header.startswith(_NEXT, at):
        return None
    digits, quote, _ = header[at + len(_NEXT) :][:16].partition(b'"')
    return int(digits) if quote and digits.isdigit() else None


def _digest(file: BinaryIO, start: bytes, header: bytes) -> bytes:
    """The checksum of a file that has been read as far as its header, in hexadecimal digits."""
    digest = hashlib.sha256(start)
    digest.update(_BEGIN + b"0" * _DIGITS)
    digest.update(header[len(_BEGIN) + _DIGITS :])
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest().encode()


def _parse(text: str | bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return found

    def refuse(number: str) -> float:
        raise ValueError(f"{number} is no number")

    read = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    if not isinstance(read, dict):
        raise ValueError("it is no object")
    return read


def _entry(row: Any, start: int) -> Entry:
    numbers = [*row["shape"], *row["data_offsets"]]
    if len(numbers) > _MOST_AXES + 2 or any(
        type(number) is not int or not 0 <= number < _MOST_BYTES for number in numbers
    ):
        raise ValueError("a size is none")
    first, last = row["data_offsets"]
    entry = Entry(DTYPES[row["dtype"]], tuple(row["shape"]), start + first, start + last)
    if entry.nbytes != prod(entry.shape) * entry.dtype.itemsize:
        raise ValueError("a tensor has other bytes than its shape")
    return entry
