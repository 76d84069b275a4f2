"""RST is passed on as RST: the other side must not take a broken transfer for a finished one."""

from __future__ import annotations

import socket

from lib.daemon import Daemon
from lib.streams import assert_talks, fill, pattern, reset, was_reset
from lib.topology import Family, Topology

HUGE = 60_000_000  # more than all the buffers on the way


def test_client_resets(net: Topology, family: Family) -> None:
    with Daemon(net.pod) as daemon:
        pair = net.pair(family)
        assert_talks(pair)
        reset(pair.client)
        assert was_reset(pair.app)
        assert daemon.wait_log()[0]["close_reason"] == "downstream_reset"


def test_application_resets(net: Topology, family: Family) -> None:
    with Daemon(net.pod) as daemon:
        pair = net.pair(family)
        assert_talks(pair)
        reset(pair.app)
        assert was_reset(pair.client)
        assert daemon.wait_log()[0]["close_reason"] == "upstream_reset"


def test_reset_after_half_close(net: Topology) -> None:
    """The application finished first; then the client gives up in the middle of its own bytes."""
    with Daemon(net.pod) as daemon:
        pair = net.pair()
        pair.app.shutdown(socket.SHUT_WR)
        assert pair.client.recv(1) == b""
        pair.client.sendall(b"half a file")
        assert pair.app.recv(100) == b"half a file"
        reset(pair.client)
        assert was_reset(pair.app)
        assert daemon.wait_log()[0]["close_reason"] == "downstream_reset"


def test_reset_while_bytes_are_stuck(net: Topology) -> None:
    """A client that gives up while the application does not read: the application hears of it."""
    with Daemon(net.pod) as daemon:
        pair = net.pair()
        assert fill(pair.client, pattern(HUGE)) < HUGE
        reset(pair.client)
        # Before the application reads again: it may never do so.
        assert daemon.wait_log()[0]["close_reason"] == "downstream_reset"
        assert was_reset(pair.app)
