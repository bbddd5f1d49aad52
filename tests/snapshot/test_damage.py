"""What is no whole snapshot is refused in one line that says why, whoever wrote it; and nothing is allocated for it."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millpond import BudgetError, Session, SnapshotError
from millpond.cache.storage import exchange
from millpond.memory import available
from millpond.models.base import Family
from tests.snapshot.forging import START, parts, refused, sealed
from tests.snapshot.test_matrix import CASES

# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_bit_that_flips_anywhere_is_noticed(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    Session.load(path, family)
    size = struct.unpack("<Q", small[:8])[0]

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.integers(0, 8 + size + 8), st.integers(0, len(small) - 1)), st.integers(1, 255))
    def flip(at: int, mask: int) -> None:
        damaged = bytearray(small)
        damaged[at] ^= mask
        path.write_bytes(damaged)
        refused(path, family)

    flip()
    for at in (*range(8 + 200), len(small) - 1):  # every byte of the fixed beginning, and the last
        damaged = bytearray(small)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refused(path, family)


def test_a_file_that_is_cut_off_or_longer_is_noticed(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    for end in (0, 1, 7, 8, 9, START, START + 70, len(small) // 2, len(small) - 1):
        path.write_bytes(small[:end])
        assert "is not a whole snapshot" in refused(path, family)
    path.write_bytes(small + b"\0")
    refused(path, family)


def test_what_is_no_snapshot_at_all_is_refused(family: Family, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text").write_text("hello, this is a text and nothing else\n" * 9)
    (tmp_path / "huge").write_bytes(b"\xff" * 64)
    for name in ("none", "fifo", "loop", "text", "huge", ".", "a\0b"):
        refused(tmp_path / name, family)
    refused(Path("/dev/zero"), family)
    with pytest.raises(SnapshotError):
        Session.load(3, family)  # type: ignore[arg-type]


def test_a_newer_format_is_named(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    header, session, payload = parts(small)
    path.write_bytes(sealed(header, {**session, "new": 1}, payload, version=2))
    assert "newer millpond: it is of format 2, and this one reads 1" in refused(path, family)


# --- forgeries ------------------------------------------------------------------------------------------------------


def set_at(session: Any, path: str, value: Any) -> None:
    *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in way:
        session = session[step]
    session[last] = value


BIG = 10**15
FORGED: dict[str, list[Any]] = {
    "stream.budget": [BIG, -1, "64MiB", 0.5, None, True],
    "stream.plan.slots": [BIG, 0, -1, None],
    "stream.plan.chunk": [BIG, 0],
    "stream.plan.lines": [{}, None],
    "stream.layers": [[], None, [[1, 2, 3]]],
    "stream.layers.0.0": [0, BIG, -1, "1", None],
    "stream.layers.0.1": [BIG, 0],
    "stream.layers.1.2": [BIG, 1],
    "stream.grid": [None, 3],
    "stream.grid.height": [BIG, 0, -56, 57],
    "stream.grid.tokens": [BIG, 1],
    "stream.clock": [{}, None],
    "stream.clock.next": [BIG, "1", None, 1e400],
    "stream.seconds": [{}, None],
    "stream.seconds.total": ["1", None],
    "stream.tokens": [-1, BIG**9, "1"],
    "stream.recent_text": [-1, "x"],
    "stream.queries": [[], [BIG] * 3, None],
    "stream.host": [{}, {"size": [BIG, BIG]}],
    "stream.admission": [3, [], {"tensor": "layers.0.keys"}, {"tensor": "no"}, {"object": "Popen", "fields": {}}],
    "stream.admission.fields.feature": [None, "x", {"tensor": "recent"}],
    "stream.admission.fields.count": ["x", None],
    "stream.frames.waiting": [[[0, BIG, BIG]], [[0]], None, [], [[0, 0, 0]]],
    "stream.frames.recent": [[[[0, BIG, BIG]]], None, [[[0, 56, 5600]]], []],
    "stream.frames.frames": ["x", None],
    "stream.frames.last_us": [BIG**9],
    "settings.policy.word": ["no such policy", "recent:a", 3, [], None, "random", "\x1b[2J"],
    "settings.policy.is": [None, {}, {"name": "\x1b[2J"}],
    "settings.admission.word": [None, "no"],
    "settings.positions": ["sideways", None],
    "settings.recent_frames": [-1, BIG, "x"],
    "settings.reserve_tokens": [BIG, -1],
    "settings.host_budget": [BIG],
    "model": [None, {}],
    "model.family": ["other\x1b[2J"],
    "model.config": [None, {"model_type": "\x1b[2J"}],
    "stream": [None, [], {}],
    "settings": [None, {}],
}


@pytest.mark.parametrize("path", FORGED)
def test_a_header_that_says_what_cannot_be_is_refused_and_nothing_is_allocated_for_it(
    path: str, small: bytes, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, largest = tmp_path / "saved", [0]
    real = torch.zeros

    def zeros(*shape: Any, **options: Any) -> Tensor:
        made = real(*shape, **options)
        largest[0] = max(largest[0], made.untyped_storage().nbytes())
        return made

    monkeypatch.setattr(exchange.torch, "zeros", zeros)
    for value in FORGED[path]:
        header, session, payload = parts(small)
        set_at(session, path, value)
        file.write_bytes(sealed(header, session, payload))
        with pytest.raises((SnapshotError, BudgetError)) as caught:
            Session.load(file, family)
        assert str(caught.value).isprintable(), value
        assert largest[0] < 300 << 10


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested values."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in steps:
        yield from leaves(one, (*path, step))


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 99), st.floats(allow_nan=False), st.text(max_size=5)
)  # fmt: skip


def test_whatever_a_header_says_is_taken_or_refused_and_nothing_else(
    small: bytes, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (header, session, payload) = tmp_path / "saved", parts(small)
    places = [place for place in leaves(session) if place[:2] != ("model", "config")]
    monkeypatch.setattr(available, "available_memory", lambda device=None: 1 << 20)

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(places), st.one_of(ANYTHING, st.lists(ANYTHING, max_size=3), st.just({})))
    def forge(place: tuple[Any, ...], value: Any) -> None:
        forged = json.loads(json.dumps(session))
        *way, last = place
        inner = forged
        for step in way:
            inner = inner[step]
        inner[last] = value
        path.write_bytes(sealed(header, forged, payload))
        said = ""
        try:
            Session.load(path, family)
        except (SnapshotError, BudgetError) as error:
            said = str(error)
        assert said.isprintable()

    forge()


def test_a_budget_that_the_machine_does_not_have_is_refused_before_anything_is_allocated(
    small: bytes, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    monkeypatch.setattr(available, "available_memory", lambda device=None: 100_000)
    monkeypatch.setattr(exchange, "zeros", None)
    with pytest.raises(BudgetError, match="more than the memory that there is"):
        Session.load(path, family)


def moved(row: dict[str, Any], by: int) -> None:
    row["data_offsets"] = [at + by for at in row["data_offsets"]]


def test_tensors_that_are_others_are_refused(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"

    def forge(change: Callable[[dict[str, Any]], object]) -> str:
        header, session, payload = parts(small)
        change(header)
        path.write_bytes(sealed(header, session, payload))
        return refused(path, family)

    key = "layers.0.keys"
    assert "lacks" in forge(lambda header: header.update({"layers.0.other": header.pop(key)}))
    assert key in forge(lambda header: header[key].update(dtype="I32"))
    assert key in forge(lambda header: header[key].update(shape=header[key]["shape"][::-1]))
    for change in (
        lambda row: row.update(dtype="F128"),
        lambda row: row.update(shape=[10**9, 10**9]),
        lambda row: row.update(shape=[2] * 40),
        lambda row: row.update(shape=[-1, -1]),
        lambda row: row.update(shape=[1.5]),
        lambda row: row.update(data_offsets=[0]),
        lambda row: moved(row, -4),
        lambda row: moved(row, 1 << 40),
    ):
        forge(lambda header, change=change: change(header[key]))
    forge(lambda header: header.update({"more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}))


@pytest.mark.parametrize(
    "header",
    [b"[" * 90_000, b'{"a":1,"a":2}', b"{}", b"null", b"\xff", b'{"__metadata__":3}', b"9" * 9000, b'{"a":NaN}'],
)
def test_a_header_that_is_no_object(header: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    begin = b'{"__metadata__":{"checksum":"' + b"0" * 64 + b'","format":"millpond-snapshot","version":"1","session":'
    for text in (header, begin + header, begin + json.dumps(header.decode("latin1")).encode() + b"}}"):
        whole = struct.pack("<Q", len(text)) + text
        if len(whole) > START + 64:
            whole = whole[:START] + hashlib.sha256(whole).hexdigest().encode() + whole[START + 64 :]
        path.write_bytes(whole)
        refused(path, family)


def test_host_memory_whose_table_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    case, path = CASES["host memory"], tmp_path / "saved"
    family = case.model()
    session = case.session(family)
    case.before(session)
    session.save(path)
    Session.load(path, family, host_budget="1MiB", host_path=tmp_path)
    header, values, payload = parts(path.read_bytes())
    first = header["host.table"]["data_offsets"][0]
    for column, number in ((1, 10**12), (2, 0), (2, -5)):
        forged = bytearray(payload)
        at = first + 24 * (values["stream"]["host"]["ring"]["end"] - 1) + 8 * column
        forged[at : at + 8] = struct.pack("<q", number)
        path.write_bytes(sealed(header, values, bytes(forged)))
        assert "host memory" in refused(path, family)
    for name, value in (("size", [10**12, 10**12]), ("ring", {}), ("span", None)):
        changed = json.loads(json.dumps(values))
        changed["stream"]["host"][name] = value
        path.write_bytes(sealed(header, changed, payload))
        refused(path, family)
