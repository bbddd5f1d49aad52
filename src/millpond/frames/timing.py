"""Stream times out of what containers say: from 0 on, ascending. Knows nothing about pictures."""

from collections.abc import Callable

# Steps back up to this are pictures out of order; larger ones are a clock that was set anew.
_DISORDER_SECONDS = 1.0


class StreamTimes:
    """Places pictures in time, one after another.

    Args:
        now: take the time of arrival instead.
        step: nominal seconds between pictures, for those without a time (raw streams).
    """

    def __init__(self, now: Callable[[], float] | None, step: float) -> None:
        self._now = now
        self.step = step
        self.last: float | None = None
        self._shift = 0.0

    def place(self, time: float | None) -> float | None:
        """Stream seconds of a picture; None for one that comes out of order and has no place."""
        if self._now is not None:
            time = self._now()
        if self.last is None:
            self._shift = -(time or 0.0)
            self.last = 0.0
            return 0.0
        seconds = self.last + self.step if time is None else time + self._shift
        if seconds <= self.last:
            if self.last - seconds <= _DISORDER_SECONDS:
                return None
            # Recordings that were joined begin their clock again.
            self._shift += self.last + self.step - seconds
            seconds = self.last + self.step
        self.last = seconds
        return seconds
