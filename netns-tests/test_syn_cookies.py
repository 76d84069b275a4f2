"""SYN cookies, forced: the proxy keeps no state between SYN and ACK, and it still works."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Family, Topology


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_syn_cookies(net: Topology, family: Family, return_path: str) -> None:
    net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n'):
        before = net.pod.netstat("SyncookiesRecv")
        pair = net.pair(family)
        assert_talks(pair)
        assert pair.app.getpeername()[0] == family.client
        # From the client and from the proxy's own upstream connection.
        assert net.pod.netstat("SyncookiesRecv") - before >= 2
