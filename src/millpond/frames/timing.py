"""Stream times out of what containers say: from 0 on, ascending. Knows nothing about pictures."""

from collections.abc import Callable

# Steps back up to this are pictures out of order also where the clock may jump.
_DISORDER_SECONDS = 1.0
# Of a step: how far apart pictures are set that came before it was clear that their times are in decoding order.
_SQUEEZE = 0.25


class StreamTimes:
    """Places pictures in time, one after another, in the order in which the decoder gives them.

    That order is right also where the stated times are not: AVI states none, and other files hold the times of pictures that
    were decoded out of turn in the order of decoding. The decoding times, which pass the decoder in order, then take over:
    from the beginning where `by_decoding` is set, otherwise from the first picture that would step back.

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
        self.by_decoding = False
        self.last: float | None = None
        self._shift = 0.0
        self._decoding_shift: float | None = None
        self._decoding_last = 0.0

    def place(self, time: float | None, decoding: float | None = None) -> float | None:
        """Stream seconds of a picture; None for one that comes out of order and has no place.

        Args:
            time: when it is to be shown, as stated, seconds on the container's clock.
            decoding: the decoding time of the packet that made the decoder give it out, on the same clock.
        """
        if self._now is not None:
            time, decoding = self._now(), None
        if self.last is None:
            self._shift = -(time or 0.0)
            self._decoding_shift = None if decoding is None else -decoding
            self.last = 0.0
            return 0.0
        # To the nanosecond: 4.9, not 4.8999999999999995.
        after = round(self.last + self.step, 9)
        decoded = self._decoded(decoding)
        stated = decoded if self.by_decoding else None if time is None else round(time + self._shift, 9)
        seconds = after if stated is None else stated
        if seconds <= self.last:
            if self._jumps and self.last - seconds > _DISORDER_SECONDS:
                self._shift += after - seconds
                self._decoding_shift = None if decoding is None else after - decoding
                seconds = after
            elif decoded is None:
                return None
            else:
                self.by_decoding = True
                seconds = max(decoded, round(self.last + _SQUEEZE * self.step, 9))
        self.last = seconds
        return seconds

    def _decoded(self, decoding: float | None) -> float | None:
        """Stream seconds by decoding times; None where those are missing or do not ascend themselves."""
        if decoding is None:
            return None
        if self._decoding_shift is None:
            self._decoding_shift = (self.last or 0.0) + self.step - decoding
        seconds = round(decoding + self._decoding_shift, 9)
        if seconds <= self._decoding_last:
            return None
        self._decoding_last = seconds
        return seconds
