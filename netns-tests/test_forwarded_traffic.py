"""Traffic that only passes through the host is none of ours, whatever port it goes to."""

from __future__ import annotations

from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import PORT, Family, Pair, Topology


def test_forwarded_connection_is_not_taken(net: Topology, family: Family) -> None:
    net.pod.sysctl("net/ipv4/ip_forward", 1)
    net.pod.sysctl("net/ipv6/conf/all/forwarding", 1)
    server = net.keep(net.beyond.listen(family.beyond, PORT))
    old = net.keep(net.client.connect(family.beyond, PORT))
    old_pair = Pair(old, net.keep(server.accept()[0]))
    with Daemon(net.pod) as daemon:
        client = net.keep(net.client.connect(family.beyond, PORT))
        far = net.keep(server.accept()[0])
        assert far.getpeername() == client.getsockname()
        assert_talks(Pair(client, far))
        assert_talks(old_pair)
        assert daemon.metric("tproxyd_connections_active") == 0
        net.pair(family)  # while what is for the host itself is taken
        assert daemon.metric("tproxyd_connections_active") == 1
