"""A link-local client, or destination, of IPv6: it is served, from the proxy's own address.

Its address binds a socket to the interface, and the answers of a local application to a foreign
address come home by lo. Some balancers send their probes from one.
"""

from __future__ import annotations

import socket

import pytest
from lib.daemon import Daemon
from lib.streams import receive
from lib.topology import PORT, V6, Topology

CLIENT, POD = "fe80::c", "fe80::d"


@pytest.mark.parametrize("where", [V6.pod, POD])
def test_a_link_local_client(net: Topology, where: str) -> None:
    net.client.ip(f"addr add {CLIENT}/64 dev c0 nodad")
    net.pod.ip(f"addr add {POD}/64 dev p0 nodad")
    server = net.app(V6)
    with Daemon(net.pod) as daemon:
        zone = net.client.inside(socket.if_nametoindex, "c0")
        client = net.keep(net.client.open_socket(socket.AF_INET6))
        client.bind((CLIENT, 0, 0, zone))
        client.connect((where, PORT, 0, zone))
        client.sendall(b"hello")
        app = net.keep(server.accept()[0])
        assert receive(app, 5) == b"hello"
        app.sendall(b"back")
        assert receive(client, 4) == b"back"
        assert app.getsockname()[0].partition("%")[0] == where
        client.close()
        app.close()
        [record] = daemon.wait_log()
        assert record["source_fallback"] == "link-local"
        zone = net.pod.inside(socket.if_nametoindex, "p0")
        assert record["downstream_remote_address"].startswith(f"[{CLIENT}%{zone}]:")
        assert daemon.metric("tproxyd_source_fallbacks_total", cause="link-local") == 1
