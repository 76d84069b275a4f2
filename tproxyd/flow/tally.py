"""What is counted, and where each count lives: the layout of the page that the workers share.

Every worker slot has one row of 64-bit integers in shared memory; a worker adds to plain cells
(`row[i] += 1`, no lock: a row has one writer) and the supervisor reads and sums the rows. This
module only says which cell means what; proc/counters.py owns the memory and proc/admin.py exports
it. prometheus-client's own counters cost 2.3 µs an increment where a cell costs 0.05, and would
need a file per process. Pure.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

from tproxyd.config import Config
from tproxyd.errors import CloseReason


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str  # as exported, without Prometheus' _total
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


CONNECTIONS = Metric(
    "tproxyd_connections",
    Kind.COUNTER,
    "Connections that ended, by how they ended.",
    ("listener", "close_reason"),
)
ACTIVE = Metric("tproxyd_connections_active", Kind.GAUGE, "Connections now open.", ("listener",))
BYTES = Metric(
    "tproxyd_bytes",
    Kind.COUNTER,
    "Payload bytes: received from downstream, sent to downstream. Added when a connection ends.",
    ("direction",),
)
MOVED = Metric(
    "tproxyd_bytes_moved",
    Kind.COUNTER,
    "Payload bytes, those of connections that are still open too; added once a second.",
    ("direction",),
)
HEADERS = Metric(
    "tproxyd_proxy_headers",
    Kind.COUNTER,
    "PROXY protocol headers, and their absence where one was looked for.",
    ("version", "result"),
)
CONNECT_SECONDS = Metric(
    "tproxyd_upstream_connect_seconds", Kind.HISTOGRAM, "Time until the upstream was connected."
)
PORT_RETRIES = Metric(
    "tproxyd_source_port_retries",
    Kind.COUNTER,
    "Source ports given up for another one, by why.",
    ("cause",),
)
SOURCE_FALLBACKS = Metric(
    "tproxyd_source_fallbacks",
    Kind.COUNTER,
    "Connections made from the proxy's own address where the client's was asked for.",
    ("cause",),
)
TLVS_LEFT_OUT = Metric(
    "tproxyd_proxy_tlvs_left_out",
    Kind.COUNTER,
    "TLVs that did not fit into a PROXY header that was sent.",
)
RETRIES = Metric(
    "tproxyd_upstream_retries",
    Kind.COUNTER,
    "Connects that failed and were followed by one to the next upstream.",
    ("listener",),
)
EJECTIONS = Metric(
    "tproxyd_upstream_ejections",
    Kind.COUNTER,
    "Times a worker left an upstream out for a while, after connects that failed.",
    ("listener",),
)
ACCEPT_PAUSES = Metric(
    "tproxyd_accept_pauses", Kind.COUNTER, "Times accepting was paused for want of files or memory."
)
LOG_DROPPED = Metric(
    "tproxyd_access_log_lines_dropped",
    Kind.COUNTER,
    "Access-log lines that could not be written.",
)
LOG_FAILING = Metric(
    "tproxyd_access_log_failing",
    Kind.GAUGE,
    "Workers that can't write the access log now, by why.",
    ("cause",),
)

METRICS = (
    CONNECTIONS,
    ACTIVE,
    BYTES,
    MOVED,
    HEADERS,
    CONNECT_SECONDS,
    PORT_RETRIES,
    SOURCE_FALLBACKS,
    TLVS_LEFT_OUT,
    RETRIES,
    EJECTIONS,
    ACCEPT_PAUSES,
    LOG_DROPPED,
    LOG_FAILING,
)


class HeaderResult(StrEnum):
    ACCEPTED = "accepted"  # it named a client
    LOCAL = "local"  # it named none (LOCAL, UNKNOWN, UNSPEC, AF_UNIX): the real endpoints count
    ABSENT = "absent"  # optional, and payload came
    MISSING = "missing"  # required, and payload or EOF came
    INVALID = "invalid"
    REJECTED = "rejected"  # a header from a peer that may not send one
    REFUSED = "refused"  # it named an address that nobody may claim
    TIMEOUT = "timeout"


class PortCause(StrEnum):
    LIVE_DOWNSTREAM = "live_downstream"  # another live connection of this client holds the tuple
    IN_USE = "in_use"  # bind: EADDRINUSE
    NOT_AVAILABLE = "not_available"  # connect: EADDRNOTAVAIL, the tuple is in TIME_WAIT
    PRIVILEGED = "privileged"  # bind: EACCES, the client's own port is below 1024
    KERNEL_CHOICE = "kernel_choice"  # none of ours was free: the kernel chose


class LogFailure(StrEnum):
    NO_SPACE = "no_space"  # on the file system, or in the quota or limit of our user
    NO_READER = "no_reader"  # the pipe's reader is gone, or nobody listens at the journal's socket
    SLOW_READER = "slow_reader"  # it takes less than there is, and so much waits that more is lost
    ERROR = "error"  # another: EIO, …

    @classmethod
    def of(cls, number: int | None) -> LogFailure:
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cls.NO_SPACE
        if number in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT):
            return cls.NO_READER
        return cls.SLOW_READER if number == errno.EAGAIN else cls.ERROR


# Why a connection is not made as the client (policy.plan_for): the upstream has an address of the
# other IP version only; it is on the client's own host; or the client is on our loopback and it is
# elsewhere.
FALLBACKS = ("family", "hairpin", "loopback", "link-local")

# Upper bounds in seconds. A local connect takes tens to hundreds of µs (the whole handshake runs
# inside it), a LAN one under a millisecond; 1 s and 3 s are the first SYN retransmissions.
CONNECT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.025, 0.1, 0.5, 1.0, 3.5)


class Cell(NamedTuple):
    metric: Metric
    labels: tuple[str, ...]  # values, in the order of metric.labels; a histogram's: ("le",) part


class Layout:
    """Which cell of a row means what, for one configuration."""

    def __init__(self, config: Config) -> None:
        self.cells: tuple[Cell, ...] = tuple(_cells([each.name for each in config.listeners]))
        self._index = {cell: i for i, cell in enumerate(self.cells)}

    def __len__(self) -> int:
        return len(self.cells)

    def index(self, metric: Metric, *labels: str) -> int:
        """The cell of `metric` with these label values; KeyError where there is none."""
        return self._index[Cell(metric, labels)]

    def gauges(self) -> tuple[int, ...]:
        """The cells that fall to zero when their worker is gone."""
        return tuple(i for i, cell in enumerate(self.cells) if cell.metric.kind is Kind.GAUGE)


def _cells(listeners: Iterable[str]) -> Iterator[Cell]:
    for name in listeners:
        yield Cell(ACTIVE, (name,))
        yield Cell(RETRIES, (name,))
        yield Cell(EJECTIONS, (name,))
        for reason in CloseReason:
            yield Cell(CONNECTIONS, (name, reason.value))
    for direction in ("received", "sent"):
        yield Cell(BYTES, (direction,))
        yield Cell(MOVED, (direction,))
    for version in ("1", "2", "-"):  # "-": none was recognised
        for result in HeaderResult:
            yield Cell(HEADERS, (version, result.value))
    for bound in CONNECT_BUCKETS:
        yield Cell(CONNECT_SECONDS, (str(bound),))
    yield Cell(CONNECT_SECONDS, ("+Inf",))
    yield Cell(CONNECT_SECONDS, ("sum",))  # in microseconds: cells are integers
    for cause in PortCause:
        yield Cell(PORT_RETRIES, (cause.value,))
    for fallback in FALLBACKS:
        yield Cell(SOURCE_FALLBACKS, (fallback,))
    yield Cell(TLVS_LEFT_OUT, ())
    yield Cell(ACCEPT_PAUSES, ())
    yield Cell(LOG_DROPPED, ())
    for failure in LogFailure:
        yield Cell(LOG_FAILING, (failure.value,))


def bucket(seconds: float) -> int:
    """Which of CONNECT_BUCKETS (or the one behind them, +Inf) a duration falls into."""
    return bisect_left(CONNECT_BUCKETS, seconds)
