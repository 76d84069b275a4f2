"""An excluded port reaches the application untouched."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Pair, Topology


def test_istios_own_ports_are_excluded_by_default(net: Topology) -> None:
    with Daemon(net.pod) as daemon:
        for port in (15020, 15021, 15090):
            app = net.keep(net.pod.listen("0.0.0.0", port))
            client = net.connect(port=port)
            accepted = net.keep(app.accept()[0])
            assert_talks(Pair(client, accepted))
            # Directly: both ends agree on the client's port, which no proxied connection does.
            assert accepted.getpeername() == client.getsockname()
        assert daemon.log() == []
        assert daemon.metric("tproxyd_connections_active") == 0
