"""src_valid_mark=1 with strict rp_filter, as WireGuard's and Cilium's hosts have it."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.streams import assert_talks
from lib.topology import Topology


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_src_valid_mark(net: Topology, return_path: str) -> None:
    for where in ("all", "default", "p0", "lo"):
        net.pod.sysctl(f"net/ipv4/conf/{where}/src_valid_mark", 1)
        net.pod.sysctl(f"net/ipv4/conf/{where}/rp_filter", 1)
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n'):
        pair = net.pair()
        assert_talks(pair)
        assert pair.app.getpeername()[0] == "10.9.1.2"
