"""Stream times out of what containers say: from 0 on, ascending. Knows nothing about pictures."""

from collections.abc import Callable

# Steps back up to this are pictures out of order also where the clock may jump.
_DISORDER_SECONDS = 1.0


class StreamTimes:
    """Places pictures in time, one after another.

    Args:
        step: nominal seconds between pictures, for those without a time (raw streams).
        jumps: the clock may be set anew, as where recordings were joined: what follows a large step back goes on one `step`
            later. Otherwise any step back is a picture out of order.
        now: take the time of arrival instead.
    """

    def __init__(self, *, step: float, jumps: bool = False, now: Callable[[], float] | None = None) -> None:
        self._jumps = jumps
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
        # To the nanosecond: 4.9, not 4.8999999999999995.
        seconds = round(self.last + self.step if time is None else time + self._shift, 9)
        if seconds <= self.last:
            if not self._jumps or self.last - seconds <= _DISORDER_SECONDS:
                return None
            self._shift += self.last + self.step - seconds
            seconds = round(self.last + self.step, 9)
        self.last = seconds
        return seconds
