"""An application that cannot be reached: the client hears of it, soon, and the log says why."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.topology import Family, Topology

CLOSED_PORT = 81
RETURN_PATHS = pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])


@RETURN_PATHS
def test_refused(net: Topology, family: Family, return_path: str) -> None:
    """The kernel's RST for a closed port belongs to no socket, and must find back to us as well."""
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n') as daemon:
        net.connect_and_end(family, CLOSED_PORT)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "upstream_refused"
        assert record["response_flags"] == "UF"
        assert record["duration"] < 1000


def test_black_hole(net: Topology, family: Family) -> None:
    """Packets to the application vanish: the deadline ends it, not the kernel's two minutes."""
    net.pod.nft(
        "table inet hole { chain output { type filter hook output priority 0; "
        f'oifname "lo" tcp dport {CLOSED_PORT} drop\n }}\n }}\n'
    )
    with Daemon(net.pod, "[[listener]]\nconnect_timeout_s = 0.5\n") as daemon:
        net.connect_and_end(family, CLOSED_PORT)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "upstream_timeout"
        assert 450 <= record["duration"] < 2000


@RETURN_PATHS
def test_unreachable(net: Topology, family: Family, return_path: str) -> None:
    """So must an ICMP error; the kernel waits with it for the first retransmission of the SYN."""
    net.pod.nft(
        "table inet wall { chain input { type filter hook input priority 0; "
        f'iifname "lo" tcp dport {CLOSED_PORT} reject with icmpx host-unreachable\n }}\n }}\n'
    )
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n') as daemon:
        net.connect_and_end(family, CLOSED_PORT)
        [record] = daemon.wait_log()
        assert record["close_reason"] == "upstream_unreachable"


def test_client_leaves_while_we_connect(net: Topology) -> None:
    """Its connection does not linger until the deadline of the other."""
    net.pod.nft(
        "table inet hole { chain output { type filter hook output priority 0; "
        f'oifname "lo" tcp dport {CLOSED_PORT} drop\n }}\n }}\n'
    )
    with Daemon(net.pod, "[[listener]]\nconnect_timeout_s = 2.0\n") as daemon:
        client = net.connect(port=CLOSED_PORT)
        client.close()
        [record] = daemon.wait_log(timeout=5)
        assert record["close_reason"] in ("upstream_timeout", "downstream_fin", "downstream_reset")
