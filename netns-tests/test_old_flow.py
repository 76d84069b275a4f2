"""A connection that is older than the rules lives on, directly, and outlives them too."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Family, Topology


def test_old_flow_survives_install_and_clean(net: Topology, family: Family) -> None:
    old = net.pair(family)
    with Daemon(net.pod) as daemon:
        assert_talks(old)
        new = net.pair(family)
        assert_talks(new)
        assert_talks(old)
        assert daemon.metric("tproxyd_connections_active") == 1
        new.client.close()
        new.app.close()
        assert daemon.stop() == 0
    assert_talks(old)
