"""Optimal forward counts and splits where a formula gives them, so that no table is needed.

`hidden` (store hidden states only) is Griewank & Walther's revolve (ACM TOMS 26(1), 2000), the same recurrence as the
HSM of Gruslys et al. (NIPS 2016, eq. 1). `internal` (store internal states only, their ISM, eq. 3) is the same curve
for one step more, less one forward a step. Knows step counts and slots; nothing about bytes, tensors or the mixed strategy.

Here t is the number of steps, and m counts stored states beside the working one (the paper's m is one larger).
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from math import comb


@lru_cache(maxsize=4096)
def _reaches(n: int) -> list[int]:
    """`reaches[r]` = binom(n + r, n): the most steps that n states reverse if no step runs more than r + 1 times.

    n counts the working state. The list grows on demand, in `_repeats`.
    """
    return [1]


def _repeats(t: int, n: int) -> tuple[int, list[int]]:
    """The smallest r with binom(n + r, n) >= t, for n >= 1, and the list of reaches up to it."""
    reaches = _reaches(n)
    while reaches[-1] < t:
        reaches.append(comb(n + len(reaches), n))
    return bisect_left(reaches, t), reaches


def hidden_forwards(t: int, m: int) -> int:
    """Fewest forward evaluations to backpropagate through t steps with m stored hidden states.

    t + r t - binom(n + r, n + 1) with n = m + 1, r the smallest integer with binom(n + r, n) >= t.
    """
    if t <= 1:
        return max(t, 0)
    n = m + 1
    r, _ = _repeats(t, n)
    return t + r * t - comb(n + r, n + 1)


def hidden_split(t: int, m: int) -> int:
    """An optimal y: advance y steps, store the hidden state there. 1 <= y < t, for t >= 2 and m >= 1.

    Both parts must cost the same per extra step. That holds when the left part, y steps with n = m + 1 states, lies
    between the reaches of r - 2 and r - 1, and the right part, t - y steps with n - 1, between those of r - 1 and r.
    """
    r, reaches = _repeats(t, m + 1)
    fewest_right = comb(m + r - 1, m)
    return max(1, min(reaches[r - 1], t - fewest_right))


def internal_forwards(t: int, m: int) -> int:
    """Fewest forward evaluations to backpropagate through t steps with m stored internal states.

    Equal to hidden_forwards(t + 1, m) - t - 1: it is revolve's count for one step more, with every step spared one
    forward, because what is stored need not be run again to be differentiated.
    """
    return hidden_forwards(t + 1, m) - t - 1 if t > 0 else 0


def internal_split(t: int, m: int) -> int:
    """An optimal y: advance y - 1 steps, run step y and keep its internal state. 1 <= y < t, for t >= 2 and m >= 1."""
    return min(hidden_split(t + 1, m), t - 1)
