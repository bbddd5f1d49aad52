"""Minnow: a small trained video model that ships inside the package. It is trained outside of it, in training/minnow."""

from millpond.minnow.checkpoint import SUPPORTED, folder

__all__ = ["SUPPORTED", "folder"]
