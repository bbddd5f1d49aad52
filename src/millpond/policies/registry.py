"""Policies by name. Built-in ones and those of other packages register alike: by the entry point group `millpond.policies`."""

from __future__ import annotations

from millpond.plugins import Plugins
from millpond.policies.base import Policy

__all__ = ["POLICIES", "available", "get", "read"]

POLICIES: Plugins[Policy] = Plugins("millpond.policies", Policy, "policy")  # type: ignore[type-abstract]
available, get, read = POLICIES.available, POLICIES.get, POLICIES.read
