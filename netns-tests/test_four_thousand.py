"""4,000 live connections from one client address: none hangs, none is lost, none is mixed up."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.topology import V4, Topology
from lib.waits import wait_for

COUNT = 4000


@pytest.mark.usefixtures("many_files")
def test_four_thousand_from_one_address(net: Topology) -> None:
    listener = net.app()
    with Daemon(net.pod) as daemon:
        clients = {}
        apps = []
        for number in range(COUNT):
            client = net.connect()
            client.sendall(number.to_bytes(4, "big"))
            clients[number] = client
            app = net.keep(listener.accept()[0])
            assert app.getpeername()[0] == V4.client
            apps.append(app)
        assert daemon.metric("tproxyd_connections_active") == COUNT
        for app in apps:  # each answers with what it was told
            app.sendall(app.recv(4))
        for number, client in clients.items():
            assert client.recv(4) == number.to_bytes(4, "big")
        for sock in (*clients.values(), *apps):
            sock.close()
        wait_for(lambda: daemon.metric("tproxyd_connections_active") == 0, "all of them closed")
        assert daemon.metric("tproxyd_connections_total") == COUNT
