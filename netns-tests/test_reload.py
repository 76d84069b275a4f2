"""A reload moves the kernel state, too: in one step, or not at all. Connections live on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from lib.backends import BACKENDS, rules
from lib.daemon import Daemon, children
from lib.streams import assert_talks
from lib.topology import V4, Topology
from lib.waits import wait_for

# include/uapi/linux/capability.h
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13


def config(backend: str, ports: str, port: int = 15006) -> str:
    return f"{rules(backend)}[[listener]]\nport = {port}\nintercept = {{ ports = [{ports}] }}\n"


def reload(daemon: Daemon, text: str, outcome: str = "done") -> None:
    count = daemon.status()["reload"][outcome]
    (daemon.scratch / "tproxyd.toml").write_text(text)
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.status()["reload"][outcome] == count + 1, f"a reload {outcome}")


def is_taken(net: Topology, port: int) -> bool:
    """Whether a connection goes through the daemon: then both ends disagree on the port."""
    with net.pod.listen("0.0.0.0", port) as app, net.client.connect(V4.pod, port) as client:
        accepted, peer = app.accept()
        accepted.close()
        assert peer[0] == client.getsockname()[0]
        return bool(peer != client.getsockname())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_taken_moves(net: Topology, backend: str) -> None:
    before = net.pod.dump()
    with Daemon(net.pod, config(backend, "80, 81")) as daemon:
        old = net.pair()
        assert_talks(old)
        assert [is_taken(net, port) for port in (81, 82)] == [True, False]
        reload(daemon, config(backend, "82", port=15007))
        assert [is_taken(net, port) for port in (81, 82)] == [False, True]
        assert_talks(old)  # though its port is not taken any more, nor its listener there
        assert daemon.get("/readyz")[0] == 200
        old.client.close()
        assert old.app.recv(1) == b""
        old.app.close()
        record = daemon.wait_record(
            lambda each: each["upstream_host"] == "10.9.1.1:80", "the old one"
        )
        assert record["close_reason"] == "downstream_fin"
        assert daemon.stop() == 0
    if backend == "nft":  # empty tables of iptables stay
        assert net.pod.dump() == before


def test_a_kernel_that_refuses_leaves_all_as_it_was(net: Topology) -> None:
    """Somebody else has a route where the new configuration wants one."""
    with Daemon(net.pod, config("nft", "80")) as daemon:
        old = net.pair()
        before = net.pod.dump()
        net.pod.ip("route add local default dev lo table 134 proto static")
        reload(daemon, "table = 134\n" + config("nft", "82", port=15007), "failed")
        assert "another program" in daemon.status()["reload"]["error"]
        net.pod.ip("route del local default dev lo table 134 proto static")
        assert net.pod.dump() == before
        assert_talks(old)
        assert_talks(net.pair())
        assert not is_taken(net, 82)
        assert daemon.get("/readyz")[0] == 200
        wait_for(lambda: len(daemon.workers()) == 2, "the end of the workers that were not wanted")


def test_who_may_change_the_kernel(net: Topology) -> None:
    """CAP_NET_ADMIN is effective in the one process that needs it."""
    with Daemon(net.pod, "workers = 1\n") as daemon:
        (worker,) = daemon.workers()
        (kernel,) = (
            pid
            for pid in children(daemon.pid)
            if Path(f"/proc/{pid}/comm").read_text() == "tproxyd/kernel\n"
        )
        assert CAP_NET_ADMIN in effective(kernel)
        assert CAP_NET_ADMIN not in effective(daemon.pid)
        assert effective(worker) == {CAP_NET_RAW}


def effective(pid: int) -> set[int]:
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    bits = int(line.split()[1], 16)
    return {number for number in range(64) if bits >> number & 1}
