"""What can go wrong, as one tree; every message says what to do.

MillpondError
├── BudgetError     the byte budget cannot hold what was asked (names the minimum that works)
├── SourceError     a file, camera, stream or codec
├── ModelError      a model family that is not supported (lists those that are)
├── PolicyError     a policy that does not exist, or whose parameters cannot work here
├── PrecisionError  a quantized model that is damaged, of another version, or asked for bits it does not hold
├── RecomputeError  a step that recomputation cannot train
└── SnapshotError   a session that cannot be saved, or a saved one that cannot be resumed
"""


class MillpondError(Exception):
    """Base of every error that millpond raises on purpose."""


class BudgetError(MillpondError):
    """The byte budget cannot hold what was asked.

    `minimum` is the smallest budget in bytes that works, where one exists.
    """

    def __init__(self, message: str, *, minimum: int | None = None) -> None:
        super().__init__(message)
        self.minimum = minimum


class SourceError(MillpondError):
    """A video source could not be opened, or broke while it was read."""


class ModelError(MillpondError):
    """The model cannot be loaded, or its family is not supported."""


class PolicyError(MillpondError):
    """A policy is unknown, or its parameters cannot work with this cache."""


class PrecisionError(MillpondError):
    """A quantized model is damaged or of another version, or cannot be read as asked."""


class RecomputeError(MillpondError):
    """The step cannot be recomputed, or the call cannot work; the message names the cause and what to do."""


class SnapshotError(MillpondError):
    """A session cannot be saved; or a saved one is damaged, of a newer format, or another model's or policy's."""


def first_line(error: BaseException) -> str:
    """What an error says, without what a library writes below it; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
