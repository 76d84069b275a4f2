"""When to try again to heal: at once as a rule, later and later where that does not help. Pure.

A heal that failed is tried again after a pause that doubles from FIRST_S up to LONGEST_S. A heal
that succeeded is undone sometimes, by a program that is just starting up; FREE_HEALS of the same
thing in a row cost no pause, and from there on it is a fight, with the same pauses: one that cannot
be won must at least be cheap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import inf

FREE_HEALS = 5
FIRST_S, LONGEST_S = 0.1, 10.0
# Without an attempt for so long (and for twice the last pause), the next begins a new row.
CALM_S = 5.0
# After a failure, something moved that may have been in the way: the next attempt comes this soon
# after the last. An attempt takes 3 ms.
SOON_S = 0.2
_FAILED = "\0"


class Pace:
    def __init__(self) -> None:
        self.not_before = -inf  # the next attempt; as all times here, of a monotonic clock
        self.fighting = False
        self._row: Counter[str] = Counter()  # what was wrong how often
        self._last, self._pause = -inf, 0.0

    def healed(self, now: float, wrong: Iterable[str]) -> int:
        """An attempt was good, for the moment; how often in a row the same was wrong by now."""
        times = self._attempt(now, wrong)
        self._wait(times - FREE_HEALS)
        self.fighting = bool(self._pause)
        return times

    def failed(self, now: float) -> None:
        self._wait(self._attempt(now, (_FAILED,)))

    def try_soon(self) -> float:
        """Something has changed: when to try again after a failure."""
        self.not_before = min(self.not_before, self._last + SOON_S)
        return self.not_before

    def hurry(self) -> None:
        """Now, whatever there was."""
        self.not_before = -inf

    def _attempt(self, now: float, wrong: Iterable[str]) -> int:
        if now - self._last > max(CALM_S, 2 * self._pause):
            self._row.clear()
        each = set(wrong)
        self._row.update(each)
        self._last = now
        return max((self._row[one] for one in each), default=0)

    def _wait(self, times: int) -> None:
        self._pause = min(FIRST_S * 2.0 ** (times - 1), LONGEST_S) if times > 0 else 0.0
        self.not_before = self._last + self._pause
