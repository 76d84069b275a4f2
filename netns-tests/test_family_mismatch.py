"""A client of one IP version cannot be the source toward the other: the proxy's own address is.

Never a hang, always counted. It happens when a load balancer that serves IPv6 clients speaks IPv4
with us.
"""

from __future__ import annotations

from lib.daemon import Daemon
from lib.headers import v1, v2
from lib.streams import receive
from lib.topology import V4, V6, Family, Topology

CONFIG = """
[[listener]]
[[listener.proxy_protocol]]
from = ["10.9.1.2", "fd00:9:1::2"]
policy = "require"
"""


def test_header_of_the_other_family(net: Topology, family: Family) -> None:
    other = V6 if family is V4 else V4
    net.app(family)
    with Daemon(net.pod, CONFIG) as daemon:
        for make in (v1, v2):
            client = net.connect(family)
            client.sendall(make(other.stranger, other.pod) + b"hello")
            app = net.accept(family)
            assert app.getpeername()[0] == family.pod
            assert receive(app, 5) == b"hello"
            client.close()
            app.close()
        for record in daemon.wait_log(2):
            assert other.stranger in record["downstream_remote_address"]
            assert record["source_fallback"] == "family"
        assert daemon.metric("tproxyd_source_fallbacks_total", cause="family") == 2
