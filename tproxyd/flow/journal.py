"""Connections as entries of systemd's journal: fields to search by, not text to take apart.

The native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram an entry to a unix socket
that anybody may send to. Each field is KEY=value and a newline; a value that has newlines itself is
KEY, a newline, its length as 64 bits little-endian, the value, a newline. An entry that is larger
than a datagram may be, that of a connection with tens of kilobytes of TLVs, goes as a sealed memfd.

    journalctl -t tproxyd TPROXYD_CLIENT=10.0.0.7
    journalctl MESSAGE_ID=3c7a38e67b5c4c2a990a63eaefec6011 TPROXYD_CLOSE_REASON=upstream_refused

Addresses that one searches for are without their port, which has a field of its own; upstreams are
known by both. What is not known of a connection has no field. MESSAGE is the text line without its
time, which the journal has itself.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator

from tproxyd.errors import CloseReason
from tproxyd.flow.backlog import KEEP_SIZE, Backlog, Fails, Later
from tproxyd.flow.proxyproto import describe
from tproxyd.flow.record import Record
from tproxyd.flow.tally import LogFailure

# Of all entries that tell of a connection, and of no others (journalctl MESSAGE_ID=…).
MESSAGE_ID = "3c7a38e67b5c4c2a990a63eaefec6011"
_ALWAYS = f"SYSLOG_IDENTIFIER=tproxyd\nMESSAGE_ID={MESSAGE_ID}\n".encode()
_ERROR, _INFO = 3, 6  # syslog.h
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def entry(life: Record, now: float) -> bytes:
    """The datagram that tells of a connection."""
    return _ALWAYS + b"".join(
        _field(key, str(value).encode()) for key, value in _fields(life, now) if value is not None
    )


def _field(key: str, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (key.encode(), struct.pack("<Q", len(value)), value)
    return b"%s=%s\n" % (key.encode(), value)


def _fields(life: Record, now: float) -> Iterator[tuple[str, object]]:
    client = life.client or life.peer
    yield "MESSAGE", life.sentence(now)
    yield "PRIORITY", _ERROR if life.reason is CloseReason.INTERNAL else _INFO
    yield "TPROXYD_LISTENER", life.listener.name
    yield "TPROXYD_CLOSE_REASON", life.reason.value
    yield "TPROXYD_DETAIL", life.detail or None
    yield "TPROXYD_CLIENT", client.host
    yield "TPROXYD_CLIENT_PORT", client.port
    yield "TPROXYD_PEER", life.peer.host
    yield "TPROXYD_PEER_PORT", life.peer.port
    if life.dst is not None:
        yield "TPROXYD_DESTINATION", life.dst.host
        yield "TPROXYD_DESTINATION_PORT", life.dst.port
    yield "TPROXYD_UPSTREAM", life.upstream
    yield "TPROXYD_SOURCE", life.source
    for upstream, _ in life.tried:  # a field may be there several times
        yield "TPROXYD_UPSTREAM_FAILED", upstream
    yield "TPROXYD_SOURCE_FALLBACK", life.fallback or None
    if life.header is not None:
        yield "TPROXYD_PROXY_PROTOCOL", json.dumps(describe(life.header))
    if life.announced is not None and life.announced.unique_id:
        yield "TPROXYD_UNIQUE_ID", life.announced.unique_id
    yield "TPROXYD_DURATION_MS", int((now - life.started) * 1000 + 0.5)
    yield "TPROXYD_BYTES_RECEIVED", life.received
    yield "TPROXYD_BYTES_SENT", life.sent
    yield "TPROXYD_RTT_US", life.rtt_us
    yield "TPROXYD_RETRANSMITS", life.retransmits


class JournalWriter(Backlog):
    """Entries that the journal does not take now are kept, up to a limit; then dropped, counted.

    It may be restarting (its socket then refuses, or is full) or gone for good: that is the same.
    The name is looked up for each entry, as sd_journal_send(3) does, so a new socket of that name
    is found.
    """

    def __init__(
        self,
        path: str,
        later: Later,
        dropped: Callable[[int], None],
        fails: Fails = lambda _: None,
        keep: int = KEEP_SIZE,
    ) -> None:
        super().__init__(later, dropped, fails, keep)
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def write(self, data: bytes) -> None:
        if self._size >= self._keep:
            self._overflow()
            return
        self._kept.append(data)
        self._size += len(data)
        if not self._refuses:
            self.flush()
        self._schedule()

    def flush(self) -> None:
        while self._kept:
            try:
                self._send(self._kept[0])
            except OSError as error:
                failure = LogFailure.of(error.errno)
                if failure is not LogFailure.SLOW_READER:  # which it is when something is lost
                    self._refuses = True
                    self._set_failure(failure)
                return
            self._size -= len(self._kept.popleft())
        self._refuses = False
        self._set_failure(None)

    def close(self) -> None:
        self.flush()
        self._drop_all()
        self._sock.close()

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendto(data, self._path)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            self._send_in_file(data)

    def _send_in_file(self, data: bytes) -> None:
        """More than a datagram: the journal reads it from a file that can't change any more."""
        try:
            fd = os.memfd_create("tproxyd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:  # no descriptor or memory, or a sandbox: those behind it must not wait
            self._dropped(1)
            return
        try:
            os.write(fd, data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))
            self._sock.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(fd)
