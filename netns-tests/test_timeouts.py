"""Deadlines: each ends what it names, and nothing that still moves."""

from __future__ import annotations

import contextlib
import socket

from lib.daemon import Daemon
from lib.headers import v2
from lib.streams import assert_talks, receive, was_reset
from lib.topology import Topology
from lib.waits import stays, wait_for


def test_idle(net: Topology) -> None:
    with Daemon(net.pod, "[[listener]]\nidle_timeout_s = 0.5\n") as daemon:
        pair = net.pair()
        busy = net.pair()

        def talk() -> bool:
            assert_talks(busy)
            return True

        stays(talk, "the busy connection", 1.2)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "idle_timeout"
        was_reset(pair.client)
        was_reset(pair.app)
        assert_talks(busy)


def test_half_close(net: Topology) -> None:
    with Daemon(net.pod, "[[listener]]\nhalf_close_timeout_s = 0.5\n") as daemon:
        pair = net.pair()
        pair.client.shutdown(socket.SHUT_WR)
        assert pair.app.recv(1) == b""

        def still_sends() -> bool:
            pair.app.sendall(b"x")
            return receive(pair.client, 1) == b"x"

        stays(still_sends, "the open half", 1.2)  # not a limit of its length, but of its silence
        assert daemon.log() == []
        [record] = daemon.wait_log()
        assert record["close_reason"] == "half_close_timeout"
        was_reset(pair.client)


def test_header(net: Topology) -> None:
    """A header that dribbles in does not get more time than one that never comes."""
    config = """
[[listener]]
header_timeout_s = 0.5
max_header_bytes = 8192
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""
    with Daemon(net.pod, config) as daemon:
        client = net.connect()
        rest = iter(v2("106.52.131.116", "10.9.1.1", tlvs=b"\x04\x0f\xff" + bytes(0xFFF)))

        def dribble() -> bool:
            with contextlib.suppress(OSError):
                client.sendall(bytes([next(rest)]))
            return bool(daemon.log())

        wait_for(dribble, "the deadline", timeout=2)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "header_timeout"
        assert 450 <= record["duration"] < 1500
        assert net.app_saw_nothing()
