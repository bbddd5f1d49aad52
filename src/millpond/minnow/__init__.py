"""Minnow: a small trained video model that ships inside the package, and the script that trains it."""

from millpond.minnow.checkpoint import folder

__all__ = ["folder"]
