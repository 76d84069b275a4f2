"""A worker's row of the page of counters: where each count stands in it, and adding to it.

flow/tally.py says which cell means what; counters.py owns the memory. A cell is added to by plain
`row[i] += 1`: a row has one writer.
"""

from __future__ import annotations

from tproxyd.config import Config
from tproxyd.errors import CloseReason
from tproxyd.flow.connection import Lane
from tproxyd.flow.tally import (
    ACCEPT_PAUSES,
    ACTIVE,
    BYTES,
    CONNECT_BUCKETS,
    CONNECT_SECONDS,
    CONNECTIONS,
    EJECTIONS,
    FALLBACKS,
    HEADERS,
    LOG_DROPPED,
    LOG_FAILING,
    MOVED,
    PORT_RETRIES,
    RETRIES,
    SOURCE_FALLBACKS,
    TLVS_LEFT_OUT,
    HeaderResult,
    Layout,
    LogFailure,
    PortCause,
    bucket,
)


class Counting:
    """The counts that connections ask for (flow/connection.py's World), in one row."""

    _row: memoryview
    _cells: Cells

    def connected(self, seconds: float) -> None:
        row, cells = self._row, self._cells
        row[cells.connect_buckets[bucket(seconds)]] += 1
        row[cells.connect_sum] += int(seconds * 1_000_000)

    def count_header(self, version: str, result: HeaderResult) -> None:
        self._row[self._cells.headers[version, result]] += 1

    def count_port_retry(self, cause: PortCause) -> None:
        self._row[self._cells.port_retries[cause]] += 1

    def count_fallback(self, cause: str) -> None:
        self._row[self._cells.fallbacks[cause]] += 1

    def count_left_out(self, tlvs: int) -> None:
        self._row[self._cells.left_out] += tlvs

    def count_retry(self, lane: Lane) -> None:
        self._row[self._cells.retries[lane.index]] += 1

    def count_log_dropped(self, lines: int) -> None:
        self._row[self._cells.log_dropped] += lines

    def log_fails(self, why: LogFailure | None) -> None:
        for cause, cell in self._cells.log_failing.items():
            self._row[cell] = cause is why


class Cells:
    """Where each count of this worker stands in its row: Layout's answers, looked up once."""

    def __init__(self, layout: Layout, config: Config) -> None:
        at, names = layout.index, [each.name for each in config.listeners]
        self.active = tuple(at(ACTIVE, name) for name in names)
        self.ended = tuple(
            {reason: at(CONNECTIONS, name, reason.value) for reason in CloseReason}
            for name in names
        )
        self.taken = (*self.active, *(cell for each in self.ended for cell in each.values()))
        self.received = at(BYTES, "received")
        self.sent = at(BYTES, "sent")
        self.moved = at(MOVED, "received"), at(MOVED, "sent")
        self.headers = {
            (version, result): at(HEADERS, version, result.value)
            for version in ("1", "2", "-")
            for result in HeaderResult
        }
        bounds = (*map(str, CONNECT_BUCKETS), "+Inf")
        self.connect_buckets = tuple(at(CONNECT_SECONDS, bound) for bound in bounds)
        self.connect_sum = at(CONNECT_SECONDS, "sum")
        self.port_retries = {cause: at(PORT_RETRIES, cause.value) for cause in PortCause}
        self.fallbacks = {cause: at(SOURCE_FALLBACKS, cause) for cause in FALLBACKS}
        self.retries = tuple(at(RETRIES, name) for name in names)
        self.ejections = tuple(at(EJECTIONS, name) for name in names)
        self.accept_pauses = at(ACCEPT_PAUSES)
        self.left_out = at(TLVS_LEFT_OUT)
        self.log_dropped = at(LOG_DROPPED)
        self.log_failing = {cause: at(LOG_FAILING, cause.value) for cause in LogFailure}
