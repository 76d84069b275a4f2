"""A reader that stalls costs its sender's patience, not our memory; and nothing is lost by it."""

from __future__ import annotations

import socket

import pytest
from lib.daemon import Daemon
from lib.processes import private_kib
from lib.streams import Receiving, assert_talks, fill, pattern
from lib.topology import Pair, Topology

# Socket buffers may grow to tcp_wmem[2] = 4 MiB and tcp_rmem[2] = 6 MiB (or what the machine says),
# at each of the two connections; what the daemon itself holds is one buffer of 256 KiB.
SIZE = 60_000_000
GROWTH_KIB = 2048


@pytest.mark.parametrize("reader", ["application", "client"])
def test_stalled_reader(net: Topology, reader: str) -> None:
    data = pattern(SIZE)
    with Daemon(net.pod) as daemon:
        warm = net.pair()
        assert_talks(warm)
        pair = net.pair()
        sender, stalled = pair if reader == "application" else Pair(pair.app, pair.client)
        workers = daemon.workers()
        before = private_kib(workers)
        sent = fill(sender, data)
        assert sent < SIZE * 2 // 3, "the sender was never held back"
        assert private_kib(workers) - before < GROWTH_KIB
        assert_talks(warm)  # and nobody else waits for it

        received = Receiving(stalled)
        sender.sendall(data[sent:])
        sender.shutdown(socket.SHUT_WR)
        assert received.result() == data
