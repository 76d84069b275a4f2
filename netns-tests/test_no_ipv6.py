"""A machine without IPv6 gets IPv4, and a line that says so."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Topology


def test_ipv6_switched_off(net: Topology) -> None:
    for where in ("all", "default"):
        net.pod.sysctl(f"net/ipv6/conf/{where}/disable_ipv6", 1)
    before = net.pod.dump()
    with Daemon(net.pod) as daemon:
        pair = net.pair()
        assert_talks(pair)
        assert pair.app.getpeername()[0] == "10.9.1.2"
        assert "ipv6" in daemon.stderr.lower()
        assert daemon.get("/readyz")[0] == 200
        pair.client.close()
        pair.app.close()
        assert daemon.stop() == 0
    assert net.pod.dump() == before
