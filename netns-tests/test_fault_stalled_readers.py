"""1 GB offered through 200 connections whose readers stall: the senders wait, and nobody else.

The kernel's socket buffers are made small here, as they are where there is little memory: so it is
the senders that hold most of it back, and all that the daemon can add is what a send left over, one
buffer of 256 KiB at most for each stream, or a pipe of the kernel's, of which a worker has few.
"""

from __future__ import annotations

import select
import socket
import time

import pytest
from lib.daemon import Daemon
from lib.figures import Figure
from lib.load import Load
from lib.processes import private_kib
from lib.streams import pattern
from lib.topology import Pair, Topology
from lib.waits import wait_for

STREAMS = 200
SIZE = 5_000_000
BUFFER_KIB = 256
QUIET_S = 0.5  # nothing has fitted anywhere for so long
SMALL = ("net.ipv4.tcp_rmem=4096 65536 262144", "net.ipv4.tcp_wmem=4096 65536 262144")


@pytest.mark.parametrize("reader", ["application", "client"])
def test_stalled_readers(net: Topology, reader: str, figure: Figure) -> None:
    for namespace in (net.client, net.pod):
        namespace.run("sysctl", "-qw", *SMALL)
    with Daemon(net.pod) as daemon:
        load = Load(net)
        load.for_(0.3, lambda: None)
        pairs = [net.pair() for _ in range(STREAMS)]
        if reader == "client":
            pairs = [Pair(app, client) for client, app in pairs]
        streams = Streams(pairs)
        workers = daemon.workers()
        memory = private_kib(workers)

        held = streams.fill()
        grown = private_kib(workers) - memory
        assert held < STREAMS * SIZE // 2, "the senders were not held back"
        assert grown < STREAMS * BUFFER_KIB + 2048
        others = load.for_(1.0, lambda: None)

        began = time.monotonic()
        streams.finish()
        took = time.monotonic() - began
        # The load keeps one connection of its own.
        wait_for(lambda: daemon.metric("tproxyd_connections_active") == 1, "their ends")
        grown_after = private_kib(workers) - memory
    figure(
        f"{held / 1e6:.0f} MB held on the way, of {STREAMS * SIZE / 1e6:.0f}; workers' memory "
        f"+ {grown} KiB, {grown / STREAMS:.1f} for each; + {grown_after} KiB afterwards"
    )
    figure(f"others meanwhile: {others}")
    figure(f"awake: the last byte after {took:.1f} s, {STREAMS * SIZE / took / 1e6:.0f} MB/s")


class Streams:
    """What each sender has still to send, and each reader to read."""

    def __init__(self, pairs: list[Pair]) -> None:
        data = pattern(SIZE)
        self._data = memoryview(data + data)
        self._buffer = bytearray(1 << 20)
        self._senders = {sender.fileno(): sender for sender, _ in pairs}
        self._readers = {reader.fileno(): reader for _, reader in pairs}
        # Each begins elsewhere in the pattern: what came through the wrong stream would show.
        self._left, self._due = {}, {}
        for number, (sender, reader) in enumerate(pairs):
            mine = self._data[number * 4096 : number * 4096 + SIZE]
            self._left[sender.fileno()] = self._due[reader.fileno()] = mine
            sender.setblocking(False)
            reader.setblocking(False)
        self._epoll = select.epoll()
        for fd in self._senders:
            self._epoll.register(fd, select.EPOLLOUT)

    def fill(self) -> int:
        """Send until nothing fits any more; how much that was."""
        while events := self._epoll.poll(QUIET_S):
            for fd, _ in events:
                self._send(fd)
        return sum(SIZE - len(left) for left in self._left.values())

    def _send(self, fd: int) -> None:
        left = self._left[fd]
        try:
            left = self._left[fd] = left[self._senders[fd].send(left[: 1 << 20]) :]
        except BlockingIOError:
            return
        if not left:
            self._epoll.unregister(fd)
            self._senders[fd].shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """Read, and send, until every byte has come, and the end behind it."""
        for fd in self._readers:
            self._epoll.register(fd, select.EPOLLIN)
        while self._readers:
            events = self._epoll.poll(10)
            assert events, f"{len(self._readers)} streams hang"
            for fd, _ in events:
                if fd in self._readers:
                    self._receive(fd)
                else:
                    self._send(fd)

    def _receive(self, fd: int) -> None:
        due = self._due[fd]
        n = self._readers[fd].recv_into(self._buffer)
        assert self._buffer[:n] == due[:n], f"not what was sent, {len(due)} bytes before the end"
        self._due[fd] = due[n:]
        if n == 0:
            assert not due, f"it ended {len(due)} bytes too soon"
            self._epoll.unregister(fd)
            self._readers.pop(fd).close()
