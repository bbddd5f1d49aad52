"""Policies by name. Built-in ones and those of other packages register alike: by the entry point group `millpond.policies`."""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from millpond.errors import PolicyError
from millpond.policies.base import Policy

__all__ = ["available", "get", "read"]

GROUP = "millpond.policies"


@cache
def _found() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        # A built-in name means the built-in policy, whatever else is installed.
        if entry.name not in found or entry.module.startswith("millpond."):
            found[entry.name] = entry
    return found


def _load(entry: EntryPoint) -> type[Policy]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise PolicyError(f"the policy {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        raise PolicyError(f"the entry point {entry.name!r} ({entry.value}) is not a millpond Policy")
    if getattr(loaded, "name", None) != entry.name:
        raise PolicyError(f"the policy {entry.name!r} ({entry.value}) must have this as its class attribute `name`")
    return loaded


def available() -> tuple[type[Policy], ...]:
    """Every policy that can be loaded, by name; one that cannot is left out (`get` says why)."""
    policies = []
    for _, entry in sorted(_found().items()):
        try:
            policies.append(_load(entry))
        except PolicyError:
            continue
    return tuple(policies)


def get(name: str, **parameters: Any) -> Policy:
    """Make a policy by name.

    Raises:
        PolicyError: unknown name (lists the known ones), broken package, unknown or impossible parameter.
    """
    entry = _found().get(name)
    if entry is None:
        raise PolicyError(f"no policy is called {name!r}; there are: {', '.join(sorted(_found()))}")
    policy = _load(entry)
    known = [field.name for field in fields(policy)]
    if unknown := sorted(set(parameters) - set(known)):
        raise PolicyError(f"{name} has no parameter {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    try:
        return policy(**parameters)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
        raise PolicyError(f"{name} cannot be made with {given or 'no parameters'}: {error}") from error


def read(text: str) -> Policy:
    """Make a policy from one word: `name`, or `name:parameter=value:...` as in `infinipot-v:alpha=0.3:pooling=1`.

    Raises:
        PolicyError: not of this form, or as `get`.
    """
    name, *pairs = text.split(":")
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PolicyError(f"{text!r}: write parameters as {name}:parameter=value")
        try:
            parameters[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[key] = value  # a word
    return get(name, **parameters)
