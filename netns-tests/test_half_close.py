"""One side may finish long before the other; what still comes the other way arrives whole."""

from __future__ import annotations

import socket

import pytest
from lib.daemon import Daemon
from lib.streams import Receiving, Sending, pattern, receive, receive_to_end
from lib.topology import Family, Pair, Topology

TEN_MB = 10_000_000


@pytest.mark.parametrize("first", ["client", "application"])
def test_ten_megabytes_after_half_close(net: Topology, family: Family, first: str) -> None:
    data = pattern(TEN_MB)
    with Daemon(net.pod) as daemon:
        pair = net.pair(family)
        early, late = pair if first == "client" else Pair(pair.app, pair.client)
        early.sendall(b"request")
        early.shutdown(socket.SHUT_WR)
        assert receive_to_end(late) == b"request"
        sending = Sending(late, data)
        assert receive_to_end(early) == data
        sending.assert_done()
        [record] = daemon.wait_log()
    received, sent = (7, TEN_MB) if first == "client" else (TEN_MB, 7)
    assert (record["bytes_received"], record["bytes_sent"]) == (received, sent)
    assert record["close_reason"] == ("downstream_fin" if first == "client" else "upstream_fin")


def test_ten_megabytes_both_ways_at_once(net: Topology) -> None:
    data = pattern(TEN_MB)
    with Daemon(net.pod):
        pair = net.pair()
        there = Sending(pair.client, data)
        back = Sending(pair.app, data[::-1])
        into_app = Receiving(pair.app)
        assert receive_to_end(pair.client) == data[::-1]
        assert into_app.result() == data
        there.assert_done()
        back.assert_done()


def test_fin_travels_at_once(net: Topology) -> None:
    """Not when the connection ends: the application learns that the request is complete."""
    with Daemon(net.pod):
        pair = net.pair()
        pair.client.shutdown(socket.SHUT_WR)
        assert pair.app.recv(1) == b""
        pair.app.sendall(b"so here is the answer")
        assert receive(pair.client, 21) == b"so here is the answer"
