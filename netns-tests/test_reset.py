"""RST is passed on as RST: the other side must not take a broken transfer for a finished one."""

from __future__ import annotations

import socket

from lib.daemon import Daemon
from lib.streams import assert_talks, fill, pattern, receive, reset, was_reset
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


def test_an_answer_that_is_followed_by_a_reset(net: Topology) -> None:
    """A server that answers 413, say, and closes with the rest of the request unread."""
    answer = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\n"
    with Daemon(net.pod) as daemon:
        for count in range(1, 51):
            pair = net.pair()
            pair.client.sendall(b"P" * 3000)
            assert receive(pair.app, 100) == b"P" * 100
            pair.app.sendall(answer)
            pair.app.close()
            assert receive(pair.client, len(answer)) == answer
            assert was_reset(pair.client)
            record = daemon.wait_log(count)[-1]
            assert record["close_reason"] == "upstream_reset"
            assert record["bytes_sent"] == len(answer)


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
