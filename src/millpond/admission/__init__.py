"""What of a frame is let in at all, before the decoder sees it: one published method a file, one contract in `base`."""

from millpond.admission.base import Admission, Verdict
from millpond.plugins import Plugins

__all__ = ["Admission", "Verdict", "available", "get", "read", "write"]

ADMISSIONS: Plugins[Admission] = Plugins("millpond.admission", Admission, "admission")  # type: ignore[type-abstract]
available, get, read, write = ADMISSIONS.available, ADMISSIONS.get, ADMISSIONS.read, ADMISSIONS.write
