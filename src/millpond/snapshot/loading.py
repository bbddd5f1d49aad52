"""Loading: a file becomes a stream that goes on as the one that was saved would have. The file is a stranger's until it has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millpond import admission, policies
from millpond.cache.recent import RecentWindow
from millpond.config import SessionConfig
from millpond.errors import MillpondError, PolicyError, SnapshotError, SourceError
from millpond.memory.budget import Budget
from millpond.models.base import Family
from millpond.snapshot.fingerprint import compare
from millpond.snapshot.format import Snapshot, opened
from millpond.snapshot.plain import decode, described, number
from millpond.snapshot.saving import SETTINGS
from millpond.snapshot.state import Empty, check_host, tensors_of
from millpond.stream.ingest import Ingest
from millpond.stream.runner import Runner


def load(
    path: str | os.PathLike[str],
    family: Family,
    *,
    host_path: str | Path | None = None,
    expected: Mapping[str, Any] | None = None,
) -> tuple[Runner, Ingest]:
    """The stream that was saved, in a memory of its own. See `millpond.Session.load`.

    Args:
        family: the model that it was saved with. host_path: as in a `SessionConfig`.
        expected: arguments of a session that must be those of the one that was saved.

    Raises:
        SnapshotError: there is no such file, it is damaged, of a newer format, or of another model, policy or other arguments; says what
            differs. BudgetError: the machine does not have the memory.
    """
    # Whatever is allocated can be written to later, wherever the caller is.
    with opened(path) as file, torch.inference_mode(False), torch.no_grad(), _believing(file):
        session = file.session
        compare(file.name, session["model"], family)
        config = _config(file, session["settings"], session["stream"]["budget"], host_path, expected or {})
        runner = Runner(family, config)
        ingest = Ingest(runner)
        _fill(file, runner, ingest, Empty(runner, session["stream"]))
    return runner, ingest


@contextmanager
def _believing(file: Snapshot) -> Iterator[None]:
    """What a file says is used as it comes; what then cannot be is the file's fault."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, SourceError, PolicyError) as error:
        raise file.damaged(str(error)) from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise file.damaged("it says what cannot be") from error


def _config(
    file: Snapshot, saved: dict[str, Any], budget: Any, host_path: Any, expected: Mapping[str, Any]
) -> SessionConfig:
    """The session's arguments as they were saved, held to those that are expected.

    Raises:
        SnapshotError: some differ; or one is needed that only the caller can give.
    """
    if unknown := sorted(set(expected) - {*SETTINGS, "policy", "admission"}):
        raise SnapshotError(f"a session has no argument {unknown[0]!r} that a snapshot could be held to")
    named = {name: saved[name] for name in SETTINGS}
    for name, read in (("policy", policies.read), ("admission", admission.read)):
        word, parameters = saved[name]["word"], saved[name]["is"]
        given = expected.get(name, word)
        if given is None and parameters is not None and name not in expected:
            is_called = parameters["name"]
            raise SnapshotError(
                f"{file.name} was saved with the {name} {is_called!r}, which no package registers: load it with {name}=..."
            )
        try:
            made = read(given) if isinstance(given, str) else given
        except PolicyError as error:
            raise SnapshotError(f"{file.name} was saved with a {name} that there is not: {error}") from error
        if (here := described(made)) != parameters:
            raise SnapshotError(f"{file.name} was saved with another {name}: {_differs(parameters, here)}")
        named[name] = made
    for name, value in expected.items():
        value = int(Budget(value)) if name == "host_budget" and value is not None else value
        if name in SETTINGS and value != saved[name]:
            raise SnapshotError(f"{file.name} was saved with {name} {saved[name]!r}, not {value!r}")
    if budget is not None:
        number(budget, 1)
    try:
        return SessionConfig(**named, budget=budget, host_path=host_path)
    except MillpondError as error:
        raise SnapshotError(f"{file.name} was saved with arguments that cannot be: {error}") from error


def _differs(saved: Any, here: Any) -> str:
    """How two policies differ, as they were described."""
    if not (isinstance(saved, dict) and isinstance(here, dict)) or saved.get("name") != here.get("name"):
        names = [one["name"] if isinstance(one, dict) and "name" in one else "none" for one in (saved, here)]
        return f"with {names[0]!r}, not {names[1]!r}"
    for key in sorted(saved.keys() | here.keys()):
        was, now = saved.get(key), here.get(key)
        if was != now:
            within = isinstance(was, dict) and isinstance(now, dict)
            return f"{saved['name']} {key}: {_differs(was, now) if within else f'it was {was!r} and is {now!r}'}"
    return "it is the same"


def _fill(file: Snapshot, runner: Runner, ingest: Ingest, empty: Empty) -> None:
    """Allocate the memory, and read the bytes into their places."""
    stream = file.session["stream"]
    state, standing = empty.state(), empty.standing()
    unread = set(file.entries)

    def read(name: str, into: Any) -> None:
        file.read(name, into)
        unread.discard(name)

    runner.restore(state)
    ingest.restore(standing)
    ingest.update_ledger()
    for name, place in tensors_of(runner.state(), standing):
        if name != "recent":
            read(name, place)
    pond = runner.pond
    check_host(pond.host)
    groups = torch.empty(file.rows("recent", 2), 2, dtype=torch.int64)
    read("recent", groups)
    pond.recent = RecentWindow(tuple((time, count) for time, count in groups.tolist()), pond.recent.text)

    left = [pond.plan.state_bytes]

    def remembered(name: str) -> Tensor:
        entry = file.entries[name]
        left[0] -= entry.nbytes
        if not name.startswith("admission.") or left[0] < 0:
            raise ValueError("an admission remembers more than it can")
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device=runner.family.device)
        read(name, tensor)
        return tensor

    kinds = () if runner.admission is None else runner.admission.state_types
    runner.admission_state = decode(stream["admission"], remembered, kinds)
    peak = number(stream["peak_bytes"])
    limit = pond.ledger.limit
    pond.ledger.peak = max(pond.ledger.peak, peak if limit is None else min(peak, limit))
    if unread:
        raise ValueError(f"nothing is known of {sorted(unread)[0][:60]!r}")
