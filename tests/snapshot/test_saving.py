"""Whatever goes wrong while a snapshot is written: one line, the previous snapshot stays, and nothing is left beside it."""

import errno
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from millpond import Session, SnapshotError
from millpond.models.base import Family
from millpond.snapshot import check_writable, replacing
from millpond.snapshot.format import opened
from tests.models.tiny import tiny
from tests.session.frames import moving
from tests.session.measure import transient_peak
from tests.snapshot.test_matrix import bits


@pytest.fixture
def session(family: Family) -> Session:
    session = Session(family, budget="300KiB", recent_frames=2)
    session.feed(list(moving(5)))
    return session


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Callable[[], BaseException], at: int | None
) -> list[str]:
    """Let call number `at` of one function of `os` raise; every call is noted."""
    calls: list[str] = []
    real = getattr(os, name)

    def call(*arguments: object, **options: object) -> object:
        calls.append(name)
        if len(calls) - 1 == at:
            raise error()
        return real(*arguments, **options)

    monkeypatch.setattr(replacing.os, name, call)
    return calls


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "error"),
    [("write", full), ("fsync", full), ("replace", full), ("open", full), ("write", KeyboardInterrupt)],
)
def test_a_disk_that_is_full_at_any_call_leaves_the_previous_snapshot(
    session: Session, tmp_path: Path, name: str, error: Callable[[], BaseException]
) -> None:
    path, scratch = tmp_path / "saved", tmp_path / "scratch"
    scratch.mkdir()
    session.save(path)
    previous = path.read_bytes()
    session.feed(list(moving(1, start=9)))
    with pytest.MonkeyPatch.context() as patched:
        calls = failing(patched, name, error, None)
        session.save(scratch / "new")
    new, told = (scratch / "new").read_bytes(), "No space left on device" if error is full else None
    replaced = 0
    for at in range(len(calls)):
        with pytest.MonkeyPatch.context() as patched:
            failing(patched, name, error, at)
            with pytest.raises(SnapshotError if told else KeyboardInterrupt, match=told) as caught:
                session.save(path)
        if told:
            assert str(caught.value).startswith(f"cannot save to {path}: ")
        found = path.read_bytes()
        assert found in (previous, new)
        replaced += found == new
        assert sorted(os.listdir(tmp_path)) == ["saved", "scratch"]
    assert len(calls) >= (20 if name == "write" else 1)
    # Only the last step comes behind the renaming: the folder is brought to disk.
    assert replaced == (name in ("fsync", "open"))


def test_short_writes_are_continued(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    session.save(one)
    write = os.write
    monkeypatch.setattr(replacing.os, "write", lambda file, data: write(file, data[:7]))
    session.save(other)
    assert one.read_bytes() == other.read_bytes()


def test_what_no_file_can_be_put_in_the_place_of_is_said_in_one_line(session: Session, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        tmp_path: "it is a folder",
        tmp_path / "none" / "saved": "No such file or directory",
        tmp_path / "file" / "saved": "Not a directory",
        tmp_path / "fifo": "it is no plain file",
        Path("/dev/null"): "it is no plain file",
        tmp_path / "loop": "symbolic links",
        tmp_path / ("n" * 300): "too long",
        tmp_path / "a\0b": "null",
        Path("/proc/saved"): "",
    }
    before = sorted(os.listdir(tmp_path))
    for path, why in cases.items():
        for save in (session.save, check_writable):
            with pytest.raises(SnapshotError) as caught:
                save(path)
            assert why in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(SnapshotError, match="a path is expected"):
        session.save(3)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == before
    check_writable(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "saved"
    path.parent.mkdir()
    session.save(path)
    previous = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(SnapshotError, match="Permission denied"):
            session.save(path)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == previous


def test_a_folder_that_refuses_a_new_file(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved"
    session.save(path)
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    failing(monkeypatch, "open", lambda: refused, 0)
    with pytest.raises(SnapshotError, match="Permission denied"):
        session.save(path)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_link_stays_and_leads_to_the_new_file(session: Session, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "saved", tmp_path / "link"
    link.symlink_to(target)
    session.save(link)  # which leads nowhere yet
    assert target.stat().st_mode & 0o777 == 0o600
    target.chmod(0o640)
    session.save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    Session.load(link, session.family)


def forked(path: Path, then: Callable[[], object]) -> int:
    """A process that is in the middle of writing a file when it does something else."""
    child = os.fork()
    if child == 0:
        try:
            with replacing.replacing(path) as file:
                file.write(b"half")
                then()
        finally:
            os._exit(0)
    return child


def test_what_killed_writers_left_is_taken_away_and_what_living_ones_write_is_not(
    session: Session, tmp_path: Path
) -> None:
    path, other = tmp_path / "saved", tmp_path / "other"
    for target in (path, other):
        os.waitpid(forked(target, lambda: os.kill(os.getpid(), signal.SIGKILL)), 0)
    assert len(os.listdir(tmp_path)) == 2
    told, tell = os.pipe()
    go_on, may = os.pipe()

    def wait() -> None:
        os.write(tell, b".")
        os.read(go_on, 1)

    living = forked(path, wait)
    assert os.read(told, 1) == b"."
    assert len(os.listdir(tmp_path)) == 2  # the living one has swept what was left of its own target
    session.save(path)
    assert len(os.listdir(tmp_path)) == 3
    os.write(may, b".")
    os.waitpid(living, 0)
    for end in (told, tell, go_on, may):
        os.close(end)
    assert path.read_bytes() == b"half"  # it was the last to finish
    session.save(other)
    assert sorted(os.listdir(tmp_path)) == ["other", "saved"]


def test_a_reader_sees_the_old_file_or_the_new_one(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    session.save(path)
    times, done = set(), threading.Event()
    faults: list[BaseException] = []

    def read() -> None:
        while not done.is_set():
            try:
                with opened(path) as file:
                    times.add(file.session["stream"]["frames"]["last_us"])
            except BaseException as fault:
                faults.append(fault)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for at in range(12):
        session.feed(list(moving(1, start=20 + at)))
        session.save(path)
    done.set()
    reader.join(60)
    assert not faults
    assert len(times) > 1


def test_neither_saving_nor_loading_holds_a_second_copy(tmp_path: Path) -> None:
    family, path = tiny("llava_onevision"), tmp_path / "saved"
    session = Session(family, budget="3MiB", policy="rekv", host_budget="3MiB", recent_frames=2)
    session.feed(list(moving(400)))
    session.save(path)  # whatever is made once, is made
    held = session.usage.live_bytes + session.usage.host_bytes
    assert held > 4 << 20
    assert path.stat().st_size > 4 << 20
    little = 200 << 10
    assert transient_peak(lambda: session.save(path)) < little
    tracemalloc.start()
    try:
        session.save(path)
        assert tracemalloc.get_traced_memory()[1] < little
    finally:
        tracemalloc.stop()
    made: list[Session] = []
    peak = transient_peak(lambda: made.append(Session.load(path, family)))
    assert peak < made[0].usage.allocated_bytes + made[0].usage.host_bytes + little


def test_a_save_during_a_turn_holds_the_stream_without_it(session: Session, tmp_path: Path) -> None:
    path, before = tmp_path / "saved", bits(session)
    pieces = session.stream("which one", max_new_tokens=8)
    next(pieces)
    saver = threading.Thread(target=session.save, args=(path,))
    saver.start()
    for _ in pieces:
        pass
    saver.join(60)
    assert not saver.is_alive()
    assert bits(Session.load(path, session.family)) == bits(session) == before
