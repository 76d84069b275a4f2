"""One worker process: a loop, an engine, limits, and an orderly end.

The supervisor forks it and calls `run`. It gives up every privilege but CAP_NET_RAW (transparent
sockets, foreign source addresses and the mark need that one, an ordinary proxy not even that), says
`ready` on its control socket, and serves until it is told to drain (a stop), to retire (others
serve from here on) or the control socket closes, which means that the supervisor is gone. It owns
nothing that must outlive it: the listening sockets and the counters are the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import uvloop

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Config, Listener, PerClient, Via
from tproxyd.errors import CloseReason
from tproxyd.flow import policy
from tproxyd.flow.announce import announcer
from tproxyd.flow.balance import Cluster
from tproxyd.flow.clients import ClientCounts
from tproxyd.flow.connect import Sockets
from tproxyd.flow.connection import Lane
from tproxyd.flow.engine import Engine, give_up
from tproxyd.flow.origdst import original_destination, redirected_destination
from tproxyd.flow.record import Record
from tproxyd.flow.relay import Limits
from tproxyd.flow.stream import Stream
from tproxyd.flow.tally import ACTIVE
from tproxyd.linux import (
    AddressKinds,
    name_process,
    reset_on_close,
    rtt_and_retransmits,
)
from tproxyd.proc import privileges, watchdog
from tproxyd.proc.cells import Cells, Counting
from tproxyd.proc.clients import ClientTables
from tproxyd.proc.control import Words
from tproxyd.proc.counters import Page
from tproxyd.proc.door import Doors
from tproxyd.proc.lister import Lister, Meter
from tproxyd.proc.workerlog import WorkerLog

log = logging.getLogger(__name__)

# File descriptors that are neither connections nor listeners: 16 pipes (flow/pipes.py), the loop,
# the engine, netlink, control and log take some 45.
_RESERVED_FILES = 64
_PING = f"{watchdog.PING}\n".encode()


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What the supervisor hands to a worker."""

    config: Config
    slot: int
    listeners: list[tuple[int, socket.socket]]  # (index in config.listeners, listening socket)
    page: Page  # the counters of every slot; rows[slot] is ours to write
    control: socket.socket
    access_log: int | None  # a file descriptor
    # Of the listeners that have a list, the usable ones: (index in config.listeners, addresses).
    upstreams: dict[int, tuple[Endpoint, ...]] = field(default_factory=dict)
    clients: ClientTables | None = None  # where a listener has limits of a client
    # What workers of other configurations count, who only serve what they still have: it is within
    # the limits, too.
    elders: tuple[tuple[Page, ClientTables | None], ...] = ()
    waits: bool = False  # nobody is accepted until the supervisor says "serve"


def run(spec: WorkerSpec) -> None:
    """Serve until drained. Exits with status 3 when it cannot start, having said why."""
    name_process(f"tproxyd/{spec.slot}")
    try:
        privileges.drop_for_sockets(transparent=spec.config.transparent)
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


class Worker(Sockets, Counting):
    """The World that connections live in (flow/connection.py), by real sockets and counters."""

    def __init__(self, spec: WorkerSpec, loop: asyncio.AbstractEventLoop) -> None:
        config = spec.config
        super().__init__(config.mark, config.listener_mark if config.outbound else 0)
        # What every connection will need is tried once, now: a kernel or a sandbox that forbids it
        # is an error at the start, not one per connection.
        self.upstream_socket(_any_plan(spoof=any(each.spoofs for each in config.listeners))).close()
        self._spec, self._loop = spec, loop
        self._kinds = AddressKinds()
        self.engine = Engine(loop)
        self.view = self.engine.view
        self._clients: ClientCounts | None = None
        if spec.clients is not None:
            limits = {each.name: each.per_client for each in config.listeners}
            tables = [*spec.clients.tables]
            for _, theirs in spec.elders:
                tables += theirs.tables if theirs is not None else ()
            self._clients = ClientCounts(tables, spec.slot, limits, spec.clients.seed)
        self._lanes = [self._lane(i) for i in range(len(config.listeners))]
        self._row = spec.page.rows[spec.slot]
        self._cells = Cells(spec.page.layout, config)
        # What is open of each listener that has a limit.
        self._open = [self._open_counts(each) for each in config.listeners]
        self._log = WorkerLog(config.log, spec.access_log, loop.call_later, self)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = soft - _RESERVED_FILES - len(spec.listeners)
        capacity = max(1, free // 2)  # connections: two sockets each
        listeners = [(sock, self._lanes[index]) for index, sock in spec.listeners]
        self._doors = Doors(self.engine, loop.call_later, listeners, capacity, self, self._paused)
        self.out_of_files = self._doors.out_of_files
        self._draining = False
        self._words = Words(spec.control)
        if not spec.waits:
            self._doors.open()
        # Stopping is the supervisor's decision. Ctrl-C and systemd signal the whole group at once,
        # and a worker that left early would leave clients before interception has ended.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        spec.control.setblocking(False)
        self._lister = Lister(self.engine, loop, spec.control)
        self._meter = Meter(self.engine, self._row, self._cells, loop)
        loop.add_reader(spec.control.fileno(), self._on_control)

    def _lane(self, index: int) -> Lane:
        config = self._spec.config
        listener = config.listeners[index]
        redirected = listener.intercepts and listener.intercept.via is Via.REDIRECT
        return Lane(
            listener=listener,
            expectation=policy.trust(listener.proxy_protocol),
            own=policy.own_sockets(config.listeners),
            limits=Limits(listener.idle_timeout_s, listener.half_close_timeout_s),
            announce=announcer(listener.send_proxy, listener.send_tlvs, os.urandom),
            cluster=(
                Cluster(listener, self._spec.upstreams.get(index, ()), self._is_here)
                if listener.upstream
                else None
            ),
            destination=redirected_destination if redirected else original_destination,
            door=original_destination if redirected else None,
            counts_clients=listener.per_client != PerClient(),
            index=index,
        )

    def _open_counts(self, listener: Listener) -> list[memoryview]:
        """Of all workers: a limit is the listener's, however its connections are spread."""
        if not listener.max_connections:
            return []
        pages = [self._spec.page, *(page for page, _ in self._spec.elders)]
        return [cell for page in pages for cell in page.cells(ACTIVE, listener.name)]

    def _is_here(self, host: str) -> bool:
        return host[0] == "/" or self._kinds.kind(host) == "own"

    def finish(self) -> None:
        self._meter.count()
        self._log.close()
        self.engine.close()
        self._kinds.close()
        super().finish()

    def _paused(self) -> None:
        self._row[self._cells.accept_pauses] += 1

    # Ending ------------------------------------------------------------------------------------

    def _on_control(self) -> None:
        try:
            data, fds = self._words.next()
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if data == _PING:
            # A supervisor that does not read hangs itself, and needs no answer.
            with contextlib.suppress(OSError):
                self._spec.control.send(self._pulse())
            return
        if self._lister.hears(data):
            return
        verb, *words = data.decode().split(" ", 1)
        if verb == "log\n":
            self._log.use(fds)
        elif verb == "serve\n":
            self._doors.open()
        elif verb == "upstreams":
            for index, upstreams in json.loads(words[0]).items():
                cluster = self._lanes[int(index)].cluster
                assert cluster is not None, "only a listener with a list hears of upstreams"
                cluster.replace(Endpoint(host, port) for host, port in upstreams)
        elif verb == "retire":
            seconds, why, *gone = words[0].split()
            self._drain(float(seconds), why, set(map(int, gone)))
        else:
            if not data:  # the supervisor is gone
                self._loop.remove_reader(self._spec.control.fileno())
            every = set(range(len(self._spec.listeners)))
            self._drain(self._spec.config.drain_timeout_s, "stop", every, shut=bool(data))
            if verb == "cut\n":
                self._cut("the stop was cut short")

    def _pulse(self) -> bytes:
        taken = sum(self._row[cell] for cell in self._cells.taken)
        return f"{watchdog.answer(taken, self._doors.accepting)}\n".encode()

    def _drain(self, limit: float, why: str, gone: set[int], *, shut: bool = True) -> None:
        """Take no more connections (Doors.leave), and end when all are done.

        After `limit` seconds at the latest.
        """
        if self._draining:
            return
        self._draining = True
        self._doors.leave(gone, shut=shut)
        self._loop.call_later(limit, self._cut, f"still open {limit:g} s after the {why}")
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._doors.done:
            self._loop.stop()

    def _cut(self, why: str) -> None:
        """End what is still open."""
        self._doors.give_up()
        self.engine.cut(CloseReason.DRAIN_TIMEOUT, why)
        self._leave_if_done()  # where there was nothing to end

    # World: what connections ask for -------------------------------------------------------------

    now = staticmethod(time.monotonic)

    def kind_of(self, host: str) -> str:
        return self._kinds.kind(host)

    def opened(self, lane: Lane) -> bool:
        cell = self._cells.active[lane.index]
        self._doors.active += 1
        self._row[cell] += 1
        limit = lane.listener.max_connections
        return not limit or sum(count[0] for count in self._open[lane.index]) <= limit

    def close(self, stream: Stream) -> None:
        self.engine.forget(stream)
        stream.close()

    def admits(self, lane: Lane, client: Client) -> str:
        assert self._clients is not None
        return self._clients.enter(lane.index, client.host, time.monotonic())

    def _leave(self, lane: Lane, client: Client, reason: CloseReason) -> None:
        if self._clients is not None and reason is not CloseReason.CLIENT_OVERLOAD:
            self._clients.leave(lane.index, client.host)

    def ejected(self, lane: Lane, upstream: Upstream, seconds: float, why: str) -> None:
        self._row[self._cells.ejections[lane.index]] += 1
        name = lane.listener.name
        log.warning("%s: %s; %s is left out for %g s", name, why, upstream, seconds)

    def returned(self, lane: Lane, upstream: Upstream) -> None:
        log.info("%s: %s takes connections again", lane.listener.name, upstream)

    def ended(
        self, lane: Lane, life: Record, downstream: Stream, upstream: Stream | None, aborted: bool
    ) -> None:
        """Close, count and log: the last thing that happens to every connection, exactly once."""
        try:
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
            if lane.cluster is not None and upstream is not None:
                assert life.upstream is not None
                lane.cluster.left(life.upstream)
            if lane.counts_clients and life.client is not None:
                self._leave(lane, life.client, life.reason)
            row, cells = self._row, self._cells
            row[cells.active[lane.index]] -= 1
            row[cells.ended[lane.index][life.reason]] += 1
            row[cells.received] += life.received
            row[cells.sent] += life.sent
            if self._log.tell is not None:
                self._log.tell(life)
            self._doors.active -= 1
            if not self._doors.accepting:
                self._doors.resume()
                self._leave_if_done()
        except MemoryError:
            give_up()  # half of this may be done


def _any_plan(spoof: bool) -> policy.Plan:
    nobody = Endpoint("127.0.0.1", 0)
    return policy.Plan(Client(nobody), Upstream(nobody), spoof)
