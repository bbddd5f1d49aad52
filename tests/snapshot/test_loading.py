"""What is no whole snapshot of this session is refused in one line that says why, whoever wrote it; and nothing is allocated for it."""

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from millpond import BudgetError, MillpondError, Session, SnapshotError
from millpond.admission import Admission, Verdict
from millpond.cache.storage import exchange
from millpond.memory import available
from millpond.models.base import Family
from millpond.policies.base import Scorer, View
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.snapshot.test_matrix import CASES, bits

START = len(b'{"__metadata__":{"checksum":"') + 8


@pytest.fixture(scope="module")
def family() -> Family:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="module")
def small(family: Family, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A snapshot of everything that one can hold, as small as can be."""
    session = Session(family, budget="300KiB", recent_frames=2, admission="curvestream")
    session.feed(list(moving(7)))
    path = tmp_path_factory.mktemp("small") / "saved"
    session.save(path)
    return path.read_bytes()


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
    import os

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


# --- another model, another policy ----------------------------------------------------------------------------------


def test_another_model_or_dtype_says_what_differs(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    assert "its weights differ" in refused(path, tiny("qwen2_5_vl", seed=1))
    assert "dtype 'float32', and this model's is 'bfloat16'" in refused(path, tiny("qwen2_5_vl", dtype=torch.bfloat16))
    assert "family 'Qwen2.5-VL'" in refused(path, tiny("qwen2_vl"))
    assert "max_position_embeddings was 32768, and is 99 here" in refused(
        path, tiny("qwen2_5_vl", max_position_embeddings=99)
    ) or "limit was 32768" in refused(path, tiny("qwen2_5_vl", max_position_embeddings=99))
    other = tiny("qwen2_5_vl")
    other.max_pixels //= 4  # type: ignore[attr-defined]
    assert "it resizes frames differently" in refused(path, other)
    other = tiny("qwen2_5_vl")
    with torch.no_grad():
        other.model.get_input_embeddings().weight[0, 0] += 1
    assert "its weights differ" in refused(path, other)
    Session.load(path, tiny("qwen2_5_vl", attn_implementation="eager"))
    model = tiny("qwen2_5_vl")
    Session.load(path, (model.model, model.tokenizer, {"min_pixels": 196, "max_pixels": 19600}))


def test_other_arguments_say_what_differs(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    same = {"policy": "infinipot-v", "positions": "contiguous", "recent_frames": 2, "admission": "curvestream"}
    Session.load(path, family, system=None, **same)  # type: ignore[arg-type]
    assert "with 'infinipot-v', not 'recent'" in refused(path, family, policy="recent")
    line = refused(path, family, policy="infinipot-v:alpha=0.25")
    assert "infinipot-v alpha: it was" in line
    assert "is 0.25" in line
    assert "curvestream k: it was 1.0 and is 2.0" in refused(path, family, admission="curvestream:k=2.0")
    assert "with 'curvestream', not 'none'" in refused(path, family, admission=None)
    assert "recent_frames 2, not 0" in refused(path, family, recent_frames=0)
    assert "system None, not 'be brief'" in refused(path, family, system="be brief")
    with pytest.raises(BudgetError, match="minimum"):
        Session.load(path, family, budget=1000)


@dataclass(frozen=True)
class Loudest(Scorer):
    """A policy that no package registers."""

    name: ClassVar[str] = "loudest"
    power: float = 2.0

    def score(self, view: View) -> Tensor:
        return view.values.float().norm(dim=2) ** self.power


@dataclass(frozen=True)
class Count:
    """What `Halves` remembers."""

    groups: int
    last: tuple[float, Tensor] | None = None
    least: float = float("inf")


@dataclass(frozen=True)
class Halves(Admission):
    """Thins every second group."""

    name: ClassVar[str] = "halves"
    source: ClassVar[str] = "this test"
    state_types: ClassVar[tuple[type, ...]] = (Count,)

    def judge(self, feature: Tensor, state: Count | None) -> tuple[Verdict, Count]:
        count = 0 if state is None else state.groups
        return "reduced" if count % 2 else "clear", Count(count + 1, (float(feature[0]), feature))

    def state_bytes(self, hidden: int) -> int:
        return 4 * hidden


def test_a_policy_and_an_admission_of_ones_own(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    session = Session(family, budget="300KiB", policy=Loudest(), admission=Halves())
    session.feed(list(moving(31)))
    session.save(path)
    assert "policy 'loudest', which no package registers: load it with policy=" in refused(path, family)
    assert "admission 'halves', which no package" in refused(path, family, policy=Loudest())
    assert "loudest power: it was 2.0 and is 3.0" in refused(path, family, policy=Loudest(3.0), admission=Halves())
    loaded = Session.load(path, family, policy=Loudest(), admission=Halves())
    for one in (session, loaded):
        one.feed(list(moving(6, start=60)))
    assert session.usage.compactions > 0
    assert bits(loaded) == bits(session)


def test_an_admission_that_remembers_what_cannot_be_saved_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    class Locked(Halves):
        def judge(self, feature: Tensor, state: Any) -> tuple[Verdict, Any]:
            return "clear", threading.Lock()

    path = tmp_path / "saved"
    session = Session(family, budget="300KiB", policy="recent", admission=Locked())
    session.feed(list(moving(4)))
    with pytest.raises(SnapshotError, match="lock cannot be saved"):
        session.save(path)
    assert not path.exists()


# --- what else may read it ------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_it(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"checksum", "format", "version", "session"}
        keys = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    length = parts(small)[1]["stream"]["layers"][0][0]
    assert keys["layers.2.keys"].shape == (2, length, 16)
    assert keys["layers.2.keys"].dtype == torch.float32


def test_a_load_that_fails_in_the_middle_leaves_nothing(small: bytes, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(small)
    with pytest.raises(MillpondError):
        Session.load(path, family, budget=1)
    assert path.read_bytes() == small
    Session.load(path, family)
