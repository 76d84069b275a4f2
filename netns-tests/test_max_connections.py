"""Over max_connections a client is refused and counted; when one leaves there is room again."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Topology
from lib.waits import wait_for


def test_max_connections(net: Topology) -> None:
    config = "workers = 1\n[[listener]]\nmax_connections = 3\n"
    with Daemon(net.pod, config) as daemon:
        pairs = [net.pair() for _ in range(3)]
        net.connect_and_end()
        assert net.app_saw_nothing()
        assert daemon.wait_log()[0]["close_reason"] == "overload"
        overloads = daemon.metric("tproxyd_connections_total", close_reason="overload")
        assert overloads == 1
        for pair in pairs:
            assert_talks(pair)
        pairs[0].client.close()
        pairs[0].app.close()
        daemon.wait_log(2)
        wait_for(lambda: daemon.metric("tproxyd_connections_active") == 2, "room")
        assert_talks(net.pair())
