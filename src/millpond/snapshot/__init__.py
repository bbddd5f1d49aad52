"""A session in one file: what it goes on with, written whole or not at all, and read without trust."""

from millpond.snapshot.loading import load
from millpond.snapshot.replacing import check_writable
from millpond.snapshot.saving import save

__all__ = ["check_writable", "load", "save"]
