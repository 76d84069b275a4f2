"""What is to be written and could not be yet: tried again on time, kept up to a limit.

Where it goes, and in which pieces, is for flow/lines.py and flow/journal.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tproxyd.flow.tally import LogFailure

# Lines wait this long for company at the most; one write for many lines costs one system call.
FLUSH_AFTER_S = 0.05
# What may wait while the other end takes nothing: some ten thousand lines. Then lines are dropped
# and counted; traffic goes on.
KEEP_SIZE = 8 * 1024 * 1024

Later = Callable[[float, Callable[[], None]], object]
Fails = Callable[[LogFailure | None], None]


class Backlog:
    """`dropped` is told of each loss, `fails` of each change between working and not, and why."""

    def __init__(
        self,
        later: Later,
        dropped: Callable[[int], None],
        fails: Fails = lambda _: None,
        keep: int = KEEP_SIZE,
    ) -> None:
        self._later, self._dropped, self._fails, self._keep = later, dropped, fails, keep
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._scheduled = False
        self._failure: LogFailure | None = None
        self._refuses = False  # it took nothing: no sooner again than on time

    @property
    def waiting(self) -> bool:
        return bool(self._kept)

    def flush(self) -> None:
        """Write what can be written now."""
        raise NotImplementedError

    def _overflow(self) -> None:
        """One that comes while `_keep` bytes wait."""
        self._dropped(1)
        if self._failure is None:
            self._set_failure(LogFailure.SLOW_READER)

    def _schedule(self) -> None:
        if self._kept and not self._scheduled:
            self._scheduled = True
            self._later(FLUSH_AFTER_S, self._on_time)

    def _on_time(self) -> None:
        self._scheduled = False
        self.flush()
        self._schedule()  # it did not take everything: come back

    def _drop_all(self) -> None:
        if self._kept:
            self._dropped(len(self._kept))
            self._kept.clear()
            self._size = 0

    def _set_failure(self, failure: LogFailure | None) -> None:
        if failure is not self._failure:
            self._failure = failure
            self._fails(failure)
