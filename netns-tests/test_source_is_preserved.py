"""The application sees the client's own address, in both IP versions, by both return paths."""

from __future__ import annotations

import pytest
from lib.daemon import Daemon
from lib.netns import MARK_SYSCTLS
from lib.streams import assert_talks
from lib.topology import PORT, V6, Family, Topology, seen_port


@pytest.mark.parametrize("return_path", ["accept-mark", "conntrack"])
def test_application_sees_the_client(net: Topology, family: Family, return_path: str) -> None:
    with Daemon(net.pod, f'[rules]\nreturn_path = "{return_path}"\n') as daemon:
        pair = net.pair(family)
        assert_talks(pair)
        # One path works without connection tracking, the other without the sysctls.
        by_mark = return_path == "accept-mark"
        assert {net.pod.sysctl(name) for name in MARK_SYSCTLS} == {133 * by_mark}
        assert ("ct mark" in net.pod.run("nft", "list", "ruleset")) == (not by_mark)
        seen_host, shown_port = pair.app.getpeername()[:2]
        host, port = pair.client.getsockname()[:2]
        assert seen_host == host == family.client
        # On one host the client's own port cannot be kept, and where it goes is public knowledge.
        assert shown_port == seen_port(port)
        assert pair.client.getpeername()[:2] == (family.pod, PORT)

        pair.client.close()
        assert pair.app.recv(1) == b""
        pair.app.close()
        [record] = daemon.wait_log()
    shown = f"[{host}]" if ":" in host else host
    shown_pod = f"[{family.pod}]" if ":" in host else family.pod
    assert record["downstream_remote_address"] == f"{shown}:{port}"
    assert record["downstream_direct_remote_address"] == f"{shown}:{port}"
    assert record["downstream_local_address"] == f"{shown_pod}:{PORT}"
    assert record["upstream_local_address"] == f"{shown}:{shown_port}"
    assert record["upstream_host"] == f"{shown_pod}:{PORT}"
    assert (record["bytes_received"], record["bytes_sent"]) == (32, 32)
    assert record["close_reason"] == "downstream_fin"
    assert record["listener"] == "inbound"


def test_return_path_is_accept_mark_in_a_namespace(net: Topology) -> None:
    with Daemon(net.pod) as daemon:
        assert {net.pod.sysctl(name) for name in MARK_SYSCTLS} == {133}
        assert "accept-mark" in daemon.stderr


def test_source_proxy_is_the_hosts_own_address(net: Topology, family: Family) -> None:
    with Daemon(net.pod, '[[listener]]\nsource = "proxy"\n'):
        pair = net.pair(family)
        assert_talks(pair)
        assert pair.app.getpeername()[0] == family.pod


def test_port_that_was_used_a_moment_ago(net: Topology, family: Family) -> None:
    """TIME_WAIT of a finished connection does not keep its source port from another destination."""
    other = net.keep(net.pod.listen("::" if family is V6 else "0.0.0.0", 81))
    net.app(family)
    with Daemon(net.pod) as daemon:
        client = net.connect(family, source_port=40_000)
        app = net.accept(family)
        client.close()
        assert app.recv(1) == b""
        app.close()
        daemon.wait_log()
        net.connect(family, 81, source_port=40_000)
        assert net.keep(other.accept()[0]).getpeername()[:2] == (family.client, seen_port(40_000))
        assert daemon.metric("tproxyd_source_port_retries_total") == 0
