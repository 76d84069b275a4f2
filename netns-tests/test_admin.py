"""The admin port: metrics, the two health questions, and the status, with the truth in them."""

from __future__ import annotations

from lib.daemon import Daemon, tproxyd
from lib.streams import assert_talks, receive
from lib.topology import Topology
from lib.waits import wait_for


def test_metrics_tell_what_happened(net: Topology) -> None:
    with Daemon(net.pod) as daemon:
        pair = net.pair()
        assert_talks(pair)
        pair.client.sendall(b"x" * 68)
        assert receive(pair.app, 68) == b"x" * 68
        assert daemon.metric("tproxyd_connections_active", listener="inbound") == 1
        pair.client.close()
        pair.app.close()
        daemon.wait_log()
        ended = {"listener": "inbound", "close_reason": "downstream_fin"}
        wait_for(lambda: daemon.metric("tproxyd_connections_total", **ended) == 1, "the count")
        assert daemon.metric("tproxyd_connections_active") == 0
        assert daemon.metric("tproxyd_bytes_total", direction="received") == 100
        assert daemon.metric("tproxyd_bytes_total", direction="sent") == 32
        assert daemon.metric("tproxyd_upstream_connect_seconds_count") == 1
        assert daemon.metric("tproxyd_workers") == len(daemon.workers())
        assert daemon.metric("tproxyd_build_info") == 1


def test_health(net: Topology) -> None:
    with Daemon(net.pod) as daemon:
        assert daemon.get("/livez")[0] == 200
        assert daemon.get("/readyz")[0] == 200
        assert daemon.get("/nothing")[0] == 404


def test_not_ready_without_the_rules(net: Topology) -> None:
    """Somebody removes them under a daemon that only watches; the kernel is asked, not a memory."""
    assert tproxyd(net.pod, "install").returncode == 0
    with Daemon(net.pod, install=False) as daemon:
        net.pod.run("nft", "delete", "table", "inet", "tproxyd")
        wait_for(lambda: daemon.get("/readyz")[0] == 503, "readyz to say so", timeout=20)
        assert daemon.get("/livez")[0] == 200
        assert tproxyd(net.pod, "install").returncode == 0
        wait_for(lambda: daemon.get("/readyz")[0] == 200, "readyz to recover", timeout=20)


def test_no_admin_port(net: Topology) -> None:
    with Daemon(net.pod, 'admin = ""\n'):
        assert_talks(net.pair())
        assert ":9133" not in net.pod.run("ss", "-Hltn")
