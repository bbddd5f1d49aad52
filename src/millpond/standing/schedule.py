"""When a standing question is due: at multiples of its interval on stream time, counted from the stream's first frame.

Whole microseconds, and multiples rather than sums: an interval that no frame rate divides does not drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from millpond.errors import MillpondError

_LONGEST_SECONDS = 10**11  # no stream lasts longer


@dataclass(frozen=True)
class Due:
    """A due time that the stream has reached.

    Attributes:
        time_us: on stream time.
        missed: due times before this one that no frame came for, so that the question was not asked at them.
    """

    time_us: int
    missed: int


class Schedule:
    """Due times of one question.

    Args:
        seconds: between two of them.

    Raises:
        MillpondError: that is no number of seconds above 0.
    """

    def __init__(self, seconds: Any) -> None:
        self.seconds = _interval(seconds)
        self._interval_us = round(self.seconds * 1e6)
        self._passed = 0

    def begin(self, origin_us: int, now_us: int) -> None:
        """Count from `origin_us`; what was due up to now is none of this question's."""
        self._passed = (now_us - origin_us) // self._interval_us

    def reached(self, origin_us: int, time_us: int) -> Due | None:
        """The latest due time up to `time_us` that was not told yet; None where there is none."""
        number = (time_us - origin_us) // self._interval_us
        if number <= self._passed:
            return None
        missed, self._passed = number - self._passed - 1, number
        return Due(origin_us + number * self._interval_us, missed)


def _interval(seconds: Any) -> float:
    try:
        number = math.nan if isinstance(seconds, bool) or not isinstance(seconds, Real) else float(seconds)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not 1e-6 <= number <= _LONGEST_SECONDS:
        raise MillpondError(
            f"an interval is a number of seconds from 1e-06 to {_LONGEST_SECONDS:.0e}, not {seconds!r:.40}"
        )
    return number
