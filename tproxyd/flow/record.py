"""What is known of a connection when it is over: one access-log line, and its counts.

JSON lines use the field names of Envoy's access log, so that pipelines people have keep working;
listener, close_reason, proxy_protocol, source_fallback, upstream_local_address_asked (the source
that was to be, where the one there is may differ), upstreams_failed (those tried before),
upstream_proxy_protocol, rtt_us and retransmits are ours. Every
connection ends in exactly one call of World.ended, with exactly one CloseReason, on every path.

A line is one expression, 2 µs, not a call of logging, which takes 6 µs for two words.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import stat
import sys
import termios
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Source, Upstream, endpoint_of
from tproxyd.config import Listener, LogFormat, SourceKind
from tproxyd.errors import CloseReason
from tproxyd.flow.announce import Announcement
from tproxyd.flow.connect import source_port
from tproxyd.flow.proxyproto import Header, describe

# Envoy's %RESPONSE_FLAGS% for each of our ends: UF upstream connection failure, UC upstream
# connection termination, UH no
# healthy upstream, DC downstream connection termination, UO upstream overflow, DPE downstream
# protocol error, UAEX unauthorized, SI stream idle timeout, LR local reset, NC no cluster found.
_FLAGS = {
    CloseReason.DOWNSTREAM_FIN: "-",
    CloseReason.UPSTREAM_FIN: "-",
    CloseReason.DOWNSTREAM_RESET: "DC",
    CloseReason.UPSTREAM_RESET: "UC",
    CloseReason.IDLE_TIMEOUT: "SI",
    CloseReason.HALF_CLOSE_TIMEOUT: "SI",
    CloseReason.HEADER_TIMEOUT: "DPE",
    CloseReason.HEADER_MISSING: "DPE",
    CloseReason.HEADER_INVALID: "DPE",
    CloseReason.HEADER_REJECTED: "UAEX",
    CloseReason.CLIENT_REFUSED: "UAEX",
    CloseReason.LOOP: "NC",
    CloseReason.OVERLOAD: "UO",
    CloseReason.CLIENT_OVERLOAD: "UO",
    CloseReason.NO_UPSTREAM: "UH",
    CloseReason.UPSTREAM_REFUSED: "UF",
    CloseReason.UPSTREAM_UNREACHABLE: "UF",
    CloseReason.UPSTREAM_TIMEOUT: "UF",
    CloseReason.NO_SOURCE_PORT: "UF",
    CloseReason.DRAIN_TIMEOUT: "LR",
    CloseReason.INTERNAL: "LR",
}
assert _FLAGS.keys() == set(CloseReason)
_ENDS = {
    reason: f'"close_reason":"{reason.value}","response_flags":"{flags}"'
    for reason, flags in _FLAGS.items()
}


class Record:
    """One connection, as far as it is known. Filled in by the walk, line by line."""

    __slots__ = (
        "announced",
        "client",
        "detail",
        "dst",
        "fallback",
        "header",
        "listener",
        "peer",
        "reason",
        "received",
        "retransmits",
        "rtt_us",
        "sent",
        "source",
        "started",
        "tried",
        "upstream",
        "wall",
    )

    def __init__(self, listener: Listener, peer: Peer, started: float, wall: float) -> None:
        self.listener = listener
        self.peer = peer
        self.started = started  # monotonic seconds
        self.wall = wall  # seconds since the epoch
        self.client: Client | None = None
        self.dst: OriginalDst | None = None
        self.upstream: Upstream | None = None  # the last one that was tried
        self.tried: tuple[tuple[Upstream, str], ...] = ()  # those that failed, and why
        self.source: Source | None = None
        self.header: Header | None = None
        self.announced: Announcement | None = None  # the PROXY header that the upstream gets
        self.fallback = ""
        self.received = 0
        self.sent = 0
        self.rtt_us = 0
        self.retransmits = 0
        self.reason = CloseReason.INTERNAL
        self.detail = ""

    def json(self, now: float) -> str:
        detail = json.dumps(self.detail) if self.detail else "null"
        header = "null" if self.header is None else _header(self.header)
        # Of five addresses at most three differ where no header and no fallback is involved.
        peer: Endpoint = self.peer
        client: Endpoint | None = self.client
        dst: Endpoint | None = self.dst
        upstream: Endpoint | None = self.upstream
        the_peer = f'"{_text(peer)}"'
        the_client = the_peer if client is peer or client is None else f'"{_text(client)}"'
        name, cluster, the_dst, the_upstream = self.listener.name, "null", "null", "null"
        if dst is not None:
            the_dst = f'"{_text(dst)}"'
            cluster = f'"{name}|{dst[1]}||"'
        if self.listener.upstream:
            cluster = f'"{name}"'
        if upstream is not None:
            the_upstream = the_dst if upstream is dst else f'"{_text(upstream)}"'
        the_source = the_asked = "null"
        if self.source is not None:
            the_source = f'"{_text(self.source)}"'
            asked = self.asked()
            if asked is not None:
                the_asked = the_source if asked == self.source else f'"{_text(asked)}"'
        the_tried = "null" if not self.tried else _tried(self.tried)
        the_fallback = f'"{self.fallback}"' if self.fallback else "null"
        the_announced = "null" if self.announced is None else _announced(self.announced)
        return (
            f'{{"start_time":"{timestamp(self.wall)}",'
            f'"duration":{int((now - self.started) * 1000 + 0.5)},'
            f'"listener":"{name}",{_ENDS[self.reason]},'
            f'"connection_termination_details":{detail},'
            f'"bytes_received":{self.received},"bytes_sent":{self.sent},'
            f'"downstream_remote_address":{the_client},'
            f'"downstream_direct_remote_address":{the_peer},'
            f'"downstream_local_address":{the_dst},'
            f'"upstream_local_address":{the_source},'
            f'"upstream_local_address_asked":{the_asked},'
            f'"upstream_host":{the_upstream},'
            f'"upstreams_failed":{the_tried},'
            f'"upstream_cluster":{cluster},'
            f'"proxy_protocol":{header},'
            f'"source_fallback":{the_fallback},'
            f'"upstream_proxy_protocol":{the_announced},'
            f'"rtt_us":{self.rtt_us},"retransmits":{self.retransmits}}}\n'
        )

    def asked(self) -> Endpoint | None:
        """The source that was to be, before any port of it was found taken; None: any of ours."""
        kind, client = self.listener.source, self.client
        if client is None or self.fallback or kind is SourceKind.PROXY:
            return None
        host, port = client
        return endpoint_of((host, source_port(port, 0, kind is SourceKind.CLIENT_PORT)))

    def text(self, now: float) -> str:
        named = self.header is not None and self.header.source is not None
        via = f" via {self.peer}" if named else ""
        as_whom = f" as {self.source}" if self.source else ""
        tried = "".join(f", not {upstream} ({why})" for upstream, why in self.tried)
        why = f" ({self.detail})" if self.detail else ""
        said = "" if self.announced is None else f" said {_announced(self.announced)}"
        return (
            f"{timestamp(self.wall)} {self.listener.name} {self.client or self.peer}{via}"
            f" -> {self.upstream or self.dst or '?'}{tried}{as_whom}"
            f" {self.reason._value_}{why} {(now - self.started) * 1000:.0f}ms"
            f" {self.received}B up {self.sent}B down rtt {self.rtt_us}us{said}\n"
        )


def formatter(kind: LogFormat) -> Callable[[Record, float], str]:
    return Record.json if kind is LogFormat.JSON else Record.text


def _header(header: Header) -> str:
    if header.local or header.tlvs or header.destination is None:
        return json.dumps(describe(header))
    # The same without the encoder, for the most usual kind of header: 1.2 µs less.
    return f'{{"version": {header.version}, "destination": "{_text(header.destination)}"}}'


def _announced(what: Announcement) -> str:
    told: dict[str, object] = {"version": what.version}
    if what.unique_id:
        told["unique_id"] = what.unique_id
    if what.left_out:
        told["tlvs_left_out"] = what.left_out
    return json.dumps(told)


def _tried(failed: tuple[tuple[Upstream, str], ...]) -> str:
    return json.dumps([{"upstream": str(upstream), "why": why} for upstream, why in failed])


def _text(endpoint: Endpoint) -> str:
    """str(endpoint), unpacked once: half the time."""
    host, port = endpoint
    if port == 0:
        return str(endpoint)  # a unix socket, and what nobody serves
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def timestamp(wall: float) -> str:
    """2026-01-31T23:59:59.123Z, as Envoy's %START_TIME% prints it."""
    second = int(wall)
    return f"{_second(second)}.{int((wall - second) * 1000):03d}Z"


@lru_cache(maxsize=8)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


# Lines wait this long for company at the most; one write for many lines costs one system call.
FLUSH_AFTER_S = 0.05
_FLUSH_SIZE = 64 * 1024
# What may wait while a pipe's reader is slow: some ten thousand lines. Then lines are dropped and
# counted; traffic goes on.
_KEEP_SIZE = 8 * 1024 * 1024


class LineWriter:
    """Lines of several workers into one file, whole, in batches, without ever blocking a worker.

    A regular file is opened with O_APPEND: one write is one piece. A pipe or terminal takes pieces
    up to PIPE_BUF atomically, and one that poll() calls writable takes such a piece without
    blocking; a longer line (tens of TLVs) goes alone, and into a pipe only when that is empty.
    (O_NONBLOCK would say the same, but belongs to the open file, which on stdout we share with
    strangers.)
    """

    def __init__(
        self,
        fd: int,
        later: Callable[[float, Callable[[], None]], object],
        dropped: Callable[[int], None],
    ) -> None:
        self._fd, self._later, self._dropped = fd, later, dropped
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._scheduled = False
        mode = os.fstat(fd).st_mode
        self._piece_size = _FLUSH_SIZE if stat.S_ISREG(mode) else select.PIPE_BUF
        self._pipe_size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) if stat.S_ISFIFO(mode) else 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, line: str) -> None:
        data = line.encode()
        if self._size >= _KEEP_SIZE or 0 < self._pipe_size < len(data):
            self._dropped(1)
            return
        self._lines.append(data)
        self._size += len(data)
        if self._size >= _FLUSH_SIZE:
            self.flush()
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        if self._lines and not self._scheduled:
            self._scheduled = True
            self._later(FLUSH_AFTER_S, self._on_time)

    def _on_time(self) -> None:
        self._scheduled = False
        self.flush()
        self._schedule()  # the reader is slow: come back

    def flush(self) -> None:
        """Write what can be written now; lines that the file refuses are dropped and counted."""
        while self._lines and (ready := self._poll.poll(0)):
            if not self._fits(len(self._lines[0])) and not ready[0][1] & select.POLLERR:
                return
            piece = [self._lines.popleft()]
            size = len(piece[0])
            while self._lines and size + len(self._lines[0]) <= self._piece_size:
                piece.append(self._lines.popleft())
                size += len(piece[-1])
            self._size -= size
            try:
                whole = os.write(self._fd, b"".join(piece)) == size
            except (
                OSError,
                MemoryError,
            ):  # ENOSPC, EPIPE: losing lines is better than losing connections
                self._dropped(len(piece))
            else:
                if not whole:
                    self._dropped(1)

    def _fits(self, size: int) -> bool:
        """Whether a line of this size can be written to a writable file without blocking."""
        if size <= select.PIPE_BUF or not self._pipe_size:
            return True
        waiting = fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4))
        return not int.from_bytes(waiting, sys.byteorder)
