"""One worker process: a loop, an engine, limits, and an orderly end.

The supervisor forks it and calls `run`. It gives up every privilege but CAP_NET_RAW (transparent
sockets, foreign source addresses and the mark need that one), says `ready` on its control socket,
and serves until it is told to drain or the control socket closes, which means that the supervisor
is gone. It owns nothing that must outlive it: the listening sockets and the counters are the
supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import pwd
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import uvloop

from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.errors import CloseReason
from tproxyd.flow import listen, policy
from tproxyd.flow.announce import announcer
from tproxyd.flow.connect import Sockets
from tproxyd.flow.connection import Lane, serve
from tproxyd.flow.engine import Engine
from tproxyd.flow.record import LineWriter, Record, formatter
from tproxyd.flow.relay import Limits
from tproxyd.flow.stream import Stream
from tproxyd.flow.tally import (
    ACCEPT_PAUSES,
    ACTIVE,
    BYTES,
    CONNECT_BUCKETS,
    CONNECT_SECONDS,
    CONNECTIONS,
    HEADERS,
    LOG_DROPPED,
    PORT_RETRIES,
    SOURCE_FALLBACKS,
    TLVS_LEFT_OUT,
    HeaderResult,
    Layout,
    PortCause,
    bucket,
)
from tproxyd.linux import (
    CAP_NET_RAW,
    CAPABILITY_NAMES,
    AddressKinds,
    become,
    capabilities,
    keep_only,
    name_process,
    reset_on_close,
    rtt_and_retransmits,
)

log = logging.getLogger(__name__)

# Connections accepted in one go before those already open get their turn.
_ACCEPT_BATCH = 64
# File descriptors that are neither connections nor listeners: 16 pipes (flow/pipes.py), the loop,
# the engine, netlink, control and log take some 45.
_RESERVED_FILES = 64
# How soon accepting is tried again when the kernel, not our own limit, had refused a descriptor.
_RETRY_ACCEPT_S = 0.1
_NO_FILES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
UNPRIVILEGED_USERS = ("tproxyd", "nobody")  # the first that exists


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What the supervisor hands to a worker."""

    config: Config
    slot: int
    listeners: list[tuple[int, socket.socket]]  # (index in config.listeners, listening socket)
    rows: list[memoryview]  # the counters of every slot, as int64; rows[slot] is ours to write
    control: socket.socket
    access_log: int | None  # a file descriptor
    # index in config.listeners -> upstreams that may be used now, names resolved
    upstreams: dict[int, tuple[Endpoint, ...]] = field(default_factory=dict)


def run(spec: WorkerSpec) -> None:
    """Serve until drained. Exits with status 3 when it cannot start, having said why."""
    name_process(f"tproxyd/{spec.slot}")
    try:
        drop_privileges()
        loop = uvloop.new_event_loop()
        worker = Worker(spec, loop)
    except Exception as error:
        log.debug("start-up", exc_info=True)
        text = str(error).replace("\n", " ")
        spec.control.send(f"failed: {text}\n".encode())
        sys.exit(3)
    # What is alive now lives as long as the process: keep the collector from walking it, and the
    # pages shared with the supervisor from being copied by it.
    gc.freeze()
    spec.control.send(b"ready\n")
    try:
        loop.run_forever()
    finally:
        worker.finish()
        loop.close()


def drop_privileges() -> None:
    """Become an ordinary user with CAP_NET_RAW alone; PermissionError names what is lacking."""
    if CAP_NET_RAW not in capabilities():
        raise PermissionError(
            f"can't open transparent sockets: {CAPABILITY_NAMES[CAP_NET_RAW]} "
            f"is missing; run as root or with AmbientCapabilities=CAP_NET_RAW"
        )
    if os.geteuid() == 0:
        user = next(filter(None, map(_user, UNPRIVILEGED_USERS)), None)
        if user is not None:
            try:
                become(user.pw_uid, user.pw_gid)
            except OSError as error:  # a user namespace that maps only root
                log.info("workers stay uid 0 (%s), with CAP_NET_RAW alone", error.strerror)
    keep_only(frozenset((CAP_NET_RAW,)))


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


class Worker(Sockets):
    """The World that connections live in (flow/connection.py), by real sockets and counters."""

    def __init__(self, spec: WorkerSpec, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(spec.config.mark)
        # What every connection will need is tried once, now: a kernel or a sandbox that forbids it
        # is an error at the start, not one per connection.
        self.upstream_socket(v6=False, spoof=True).close()
        self._spec, self._loop = spec, loop
        self._kinds = AddressKinds()
        self.engine = Engine(loop)
        self.view = self.engine.view
        config = spec.config
        own_ports = frozenset(each.port for each in config.listeners)
        lanes = [
            Lane(
                listener=each,
                expectation=policy.trust(each.proxy_protocol),
                own_ports=own_ports,
                limits=Limits(each.idle_timeout_s, each.half_close_timeout_s),
                announce=announcer(each.send_proxy, each.send_tlvs, os.urandom),
                index=i,
            )
            for i, each in enumerate(config.listeners)
        ]
        self._doors = [Door(self, sock, lanes[index]) for index, sock in spec.listeners]
        self._row = spec.rows[spec.slot]
        self._cells = Cells(Layout(config), config)
        self._rows = spec.rows
        self._format = formatter(config.log.format)
        self._log = (
            LineWriter(spec.access_log, loop.call_later, self._log_dropped)
            if spec.access_log is not None
            else None
        )
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = soft - _RESERVED_FILES - len(spec.listeners)
        self._capacity = max(1, free // 2)  # connections: two sockets each
        self._active = 0
        self._listening = False
        self._draining = False
        self._resume_accepting()
        # Stopping is the supervisor's decision. Ctrl-C and systemd signal the whole group at once,
        # and a worker that left early would leave clients before interception has ended.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        spec.control.setblocking(False)
        loop.add_reader(spec.control.fileno(), self._on_control)

    def finish(self) -> None:
        if self._log is not None:
            self._log.flush()
        self.engine.close()
        self._kinds.close()
        super().finish()

    # Accepting ---------------------------------------------------------------------------------

    def _resume_accepting(self) -> None:
        if self._listening or self._draining or self._active >= self._capacity:
            return
        self._listening = True
        for door in self._doors:
            self.engine.listen(door.sock, door)

    def _pause_accepting(self) -> None:
        if self._listening:
            self._listening = False
            for door in self._doors:
                self.engine.unlisten(door.sock)

    def accept(self, door: Door, count: int) -> bool:
        """Take up to so many waiting connections; whether there may be more.

        Out of file descriptors, accepting pauses: what waits in the queue stays there, and is
        served when a connection has ended or, where the kernel's limit was met first, soon after.
        """
        for _ in range(count):
            if self._active >= self._capacity:
                self._row[self._cells.accept_pauses] += 1
                self._pause_accepting()
                return False
            try:
                downstream, peer = listen.accept(door.sock)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _NO_FILES:
                    continue  # that one connection failed before it was ours (accept(2))
                self._row[self._cells.accept_pauses] += 1
                self._pause_accepting()
                self._loop.call_later(_RETRY_ACCEPT_S, self._resume_accepting)
                return False
            self.engine.start(serve(downstream, peer, door.lane, self))
        return True

    # Ending ------------------------------------------------------------------------------------

    def _on_control(self) -> None:
        try:
            data = self._spec.control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the supervisor is gone
            self._loop.remove_reader(self._spec.control.fileno())
        self._drain()
        if data == b"cut\n":
            self._cut("the stop was cut short")

    def _drain(self) -> None:
        """Serve what waits in the accept queues, take no more, and leave when all are done."""
        if self._draining:
            return
        for door in self._doors:
            while self.accept(door, _ACCEPT_BATCH):
                pass
        self._pause_accepting()
        for _, sock in self._spec.listeners:
            # The supervisor has it open too. Nobody will accept from it again, and a client must
            # not wait in its queue: this makes the kernel refuse whoever comes now.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
        self._draining = True
        limit = self._spec.config.drain_timeout_s
        self._loop.call_later(limit, self._cut, f"still open {limit:g} s after the stop")
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._draining and not self._active:
            self._loop.stop()

    def _cut(self, why: str) -> None:
        """End what is still open."""
        self.engine.cut(CloseReason.DRAIN_TIMEOUT, why)

    # World: what connections ask for -------------------------------------------------------------

    now = staticmethod(time.monotonic)

    def kind_of(self, host: str) -> str:
        return self._kinds.kind(host)

    def opened(self, lane: Lane) -> bool:
        cell = self._cells.active[lane.index]
        self._active += 1
        self._row[cell] += 1
        limit = lane.listener.max_connections
        # Summed over all workers: a limit is the listener's, however its connections are spread.
        return not limit or sum(row[cell] for row in self._rows) <= limit

    def close(self, stream: Stream) -> None:
        self.engine.forget(stream)
        stream.close()

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

    def _log_dropped(self, lines: int) -> None:
        self._row[self._cells.log_dropped] += lines

    def ended(
        self, lane: Lane, life: Record, downstream: Stream, upstream: Stream | None, aborted: bool
    ) -> None:
        """Close, count and log: the last thing that happens to every connection, exactly once."""
        try:  # not contextlib.suppress: 0.5 µs
            life.rtt_us, life.retransmits = rtt_and_retransmits(downstream)
        except OSError:
            life.rtt_us = 0  # it is no longer connected enough to tell
        forget = self.engine.forget
        for stream in (downstream, upstream):
            if stream is not None:
                if aborted:
                    reset_on_close(stream)
                forget(stream)
                stream.close()
        row, cells = self._row, self._cells
        row[cells.active[lane.index]] -= 1
        row[cells.ended[lane.index][life.reason]] += 1
        row[cells.received] += life.received
        row[cells.sent] += life.sent
        if self._log is not None:
            self._log.write(self._format(life, time.monotonic()))
        self._active -= 1
        if not self._listening:
            self._resume_accepting()
            self._leave_if_done()


class Door:
    """A listening socket, and how many connections are taken from it at a time.

    One, when it has been quiet; twice as many each time that the next round of events finds more.
    epoll tells again what is left in the queue, so nobody asks an empty one: an accept that finds
    nothing ends in an exception, 2.5 µs.
    """

    __slots__ = ("_count", "_round", "_worker", "lane", "sock")

    def __init__(self, worker: Worker, sock: socket.socket, lane: Lane) -> None:
        self._worker, self.sock, self.lane = worker, sock, lane
        self._count = 1
        self._round = 0

    def on_event(self, _events: int) -> None:
        now = self._worker.engine.rounds
        self._count = min(self._count * 2, _ACCEPT_BATCH) if now <= self._round + 1 else 1
        self._round = now
        self._worker.accept(self, self._count)

    def cut(self, reason: CloseReason, detail: str) -> None:
        """Nothing: no connection of its own."""


class Cells:
    """Where each count of this worker stands in its row: Layout's answers, looked up once."""

    def __init__(self, layout: Layout, config: Config) -> None:
        at, names = layout.index, [each.name for each in config.listeners]
        self.active = tuple(at(ACTIVE, name) for name in names)
        self.ended = tuple(
            {reason: at(CONNECTIONS, name, reason.value) for reason in CloseReason}
            for name in names
        )
        self.received = at(BYTES, "received")
        self.sent = at(BYTES, "sent")
        self.headers = {
            (version, result): at(HEADERS, version, result.value)
            for version in ("1", "2", "-")
            for result in HeaderResult
        }
        bounds = (*map(str, CONNECT_BUCKETS), "+Inf")
        self.connect_buckets = tuple(at(CONNECT_SECONDS, bound) for bound in bounds)
        self.connect_sum = at(CONNECT_SECONDS, "sum")
        self.port_retries = {cause: at(PORT_RETRIES, cause.value) for cause in PortCause}
        self.fallbacks = {"family": at(SOURCE_FALLBACKS, "family")}
        self.accept_pauses = at(ACCEPT_PAUSES)
        self.left_out = at(TLVS_LEFT_OUT)
        self.log_dropped = at(LOG_DROPPED)
