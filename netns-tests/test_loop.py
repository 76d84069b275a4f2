"""A connection to the proxy's own port has no destination but the proxy: refused, not looped."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Family, Topology
from lib.waits import wait_for


def test_own_port_is_refused(net: Topology, family: Family) -> None:
    with Daemon(net.pod) as daemon:
        net.connect_and_end(family, 15006)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "loop"
        assert_talks(net.pair(family))


def test_header_cannot_make_a_loop(net: Topology) -> None:
    """The destination in a header is the sender's view; where we connect is the packet's."""
    config = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2"]
policy = "require"
"""
    net.app()
    with Daemon(net.pod, config) as daemon:
        client = net.connect()
        client.sendall(b"PROXY TCP4 106.52.131.116 10.9.1.1 4000 15006\r\nhello")
        app = net.accept()
        assert app.recv(5) == b"hello"
        assert daemon.metric("tproxyd_connections_active") == 1


def test_other_listeners_port_is_refused_too(net: Topology) -> None:
    config = """
[[listener]]
name = "one"
port = 15006
intercept = { ports = [80, 15007] }
[[listener]]
name = "two"
port = 15007
intercept = { ports = [81, 15006] }
"""
    with Daemon(net.pod, config) as daemon:
        for port in (15006, 15007):
            net.connect_and_end(port=port)
        wait_for(lambda: len(daemon.log()) == 2, "two refusals")
        assert {record["close_reason"] for record in daemon.log()} == {"loop"}
