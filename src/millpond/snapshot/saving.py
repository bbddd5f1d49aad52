"""Saving: a stream at rest becomes a file."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from millpond import admission, policies
from millpond.config import SessionConfig
from millpond.errors import PolicyError
from millpond.snapshot.fingerprint import fingerprint
from millpond.snapshot.format import write
from millpond.snapshot.plain import described, to_values
from millpond.snapshot.state import values_of
from millpond.stream.ingest import Ingest
from millpond.stream.runner import Runner

SETTINGS = ("positions", "system", "reserve_tokens", "recent_frames", "host_budget")
"""Fields of a `SessionConfig` that are stored as they are."""


def save(runner: Runner, ingest: Ingest, path: str | os.PathLike[str]) -> None:
    """Write a stream, which nobody changes meanwhile, to a file, in place of what was there. See `millpond.Session.save`.

    Raises:
        SnapshotError: it cannot be written, or holds what cannot be; what was there stays.
    """
    stream, tensors = values_of(runner, ingest)
    session = {
        "millpond": version("millpond"),
        "model": fingerprint(runner.family),
        "settings": settings(runner.config),
        "stream": stream,
    }
    write(path, session, tensors)


def settings(config: SessionConfig) -> dict[str, Any]:
    """A session's arguments in plain values. A policy and an admission are written in one word, None where there is none, and with all of
    their parameters."""
    values = to_values(config)
    plain: dict[str, Any] = {name: values[name] for name in SETTINGS}
    for name, write_word in (("policy", policies.write), ("admission", admission.write)):
        word = None
        if values[name] is not None:
            with suppress(PolicyError):  # it is not registered: whoever loads it gives it
                word = write_word(values[name])
        plain[name] = {"word": word, "is": described(values[name])}
    return plain
