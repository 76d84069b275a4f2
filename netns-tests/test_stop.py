"""SIGTERM: no new connections, the old ones to their end, and nothing stays in the kernel."""

from __future__ import annotations

import signal
import socket

import pytest
from lib.daemon import Daemon, tproxyd
from lib.processes import is_gone
from lib.streams import Receiving, assert_talks, fill, pattern, receive
from lib.topology import Topology
from lib.waits import wait_for

SIZE = 60_000_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_transfer_finishes_after_the_signal(net: Topology, number: signal.Signals) -> None:
    data = pattern(SIZE)
    before = net.pod.dump()
    with Daemon(net.pod) as daemon:
        workers = daemon.workers()
        pair = net.pair()
        sent = fill(pair.client, data, quiet_s=0.2)
        assert sent < SIZE
        daemon.signal(number)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")
        received = Receiving(pair.app)
        pair.client.sendall(data[sent:])
        pair.client.shutdown(socket.SHUT_WR)
        assert received.result() == data
        pair.app.sendall(b"got it")
        pair.app.close()
        assert receive(pair.client, 6) == b"got it"
        assert daemon.process.wait(10) == 0
        [record] = daemon.log()
        assert record["bytes_received"] == SIZE
        assert all(map(is_gone, workers))
    assert net.pod.dump() == before


@pytest.mark.parametrize("owns_the_rules", [True, False])
def test_nobody_waits_in_vain_while_it_drains(net: Topology, owns_the_rules: bool) -> None:
    """New clients get to the application directly or are refused, never into a dead queue."""
    if not owns_the_rules:
        assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod, install=owns_the_rules) as daemon:
        held = net.pair()
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.has_notified("STOPPING=1"), "STOPPING=1")

        def is_answered() -> bool:
            """Refused, or connected to somebody: to the application itself in the end."""
            try:
                client = net.connect()
            except (ConnectionRefusedError, ConnectionResetError):
                return True
            with client, net.accept() as app:
                return bool(app.getpeername() == client.getsockname())

        wait_for(is_answered, "the end of interception")
        assert_talks(held)
        held.client.close()
        held.app.close()
        assert daemon.process.wait(10) == 0


def test_drain_has_a_deadline(net: Topology) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, "drain_timeout_s = 0.5\n") as daemon:
        net.pair()
        assert daemon.stop(timeout=5) == 0
        assert daemon.log()[0]["close_reason"] == "drain_timeout"
    assert net.pod.dump() == before


def test_as_pid_1(net: Topology) -> None:
    """The first process of a container gets no default signal handlers, and every orphan."""
    before = net.pod.dump()
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with Daemon(net.pod, prefix=unshare) as daemon:
        pair = net.pair()
        assert_talks(pair)
        pair.client.close()
        pair.app.close()
        assert daemon.stop() == 0
    assert net.pod.dump() == before
