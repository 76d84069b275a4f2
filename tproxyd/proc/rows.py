"""The words for a connection that is open: what a worker tells of it, and how it is sorted.

Both ends of one format, in one file: a worker makes rows (flow/live.py, proc/lister.py), the
supervisor merges those of all workers, and `status`, `top` and the status page draw them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypedDict

from tproxyd.addr import parse_ip


class Row(TypedDict):
    """One open connection."""

    id: str  # what `tproxyd kill` takes
    listener: str
    client: str  # on whose behalf; the peer, while that is not known yet
    peer: str | None  # who really connected, where that is somebody else
    destination: str | None  # where the client meant to go; None: an ordinary listener's, early
    upstream: str | None  # where we connect, or are connected
    source: str | None  # what the upstream sees as its peer
    state: str
    received: int  # bytes of payload from downstream that the upstream has taken
    sent: int  # and the other way
    rate: float  # bytes/s, both ways together: since somebody last looked, else over its life
    age_s: float
    idle_s: float
    rtt_us: int  # to the peer, as the kernel measures it; 0: not known


class State(StrEnum):
    HEADER = "header"  # a PROXY header is waited for
    CONNECTING = "connecting"
    RELAYING = "relaying"
    CLIENT_DONE = "client done"  # half-closed: the client has sent its FIN
    UPSTREAM_DONE = "upstream done"


class Sort(StrEnum):
    BYTES = "bytes"  # most first
    RATE = "rate"  # most first
    AGE = "age"  # oldest first
    IDLE = "idle"  # longest first
    RTT = "rtt"  # longest first
    CLIENT = "client"  # by address


# The smallest key comes first. Ties are broken by the id, so that a table does not flicker.
KEYS: dict[Sort, Callable[[Row], Any]] = {
    Sort.BYTES: lambda row: -(row["received"] + row["sent"]),
    Sort.RATE: lambda row: -row["rate"],
    Sort.AGE: lambda row: -row["age_s"],
    Sort.IDLE: lambda row: -row["idle_s"],
    Sort.RTT: lambda row: -row["rtt_us"],
    Sort.CLIENT: lambda row: client_key(*_split(row["client"])),
}


def client_key(host: str, port: int) -> tuple[int, int, int]:
    address = parse_ip(host)
    return address.version, int(address), port


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


class Listing(TypedDict):
    """What /connections and `tproxyd status --connections` say."""

    open: int  # all of them
    sort: str
    connections: list[Row]  # the first of them, in that order
    silent: list[int]  # workers (pids) that did not answer in time: theirs are missing


# Shown where nobody asks for another number; and the most there can be: a few megabytes.
LIMIT, MAX_LIMIT = 20, 10_000
