"""`tproxyd doctor` for gateways and routers: whether answers of others come home, by trying."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from lib.daemon import Daemon, tproxyd
from lib.gateway import at, backend, to_neighbour
from lib.topology import V4, Family, Topology

Check = dict[str, Any]


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, Check]:
    return {check["name"]: check for check in json.loads(done.stdout)}


def doctor(net: Topology, config: str) -> dict[str, Check]:
    found = checks(tproxyd(net.pod, "doctor", "--json", config=config))
    assert all(check["remedy"] for check in found.values() if check["verdict"] != "ok")
    return found


def complaints(net: Topology, config: str) -> dict[str, Check]:
    return {n: check for n, check in doctor(net, config).items() if check["verdict"] != "ok"}


def test_answers_that_come_home(net: Topology, family: Family) -> None:
    server = backend(net, family)
    config = to_neighbour(family, source="client")
    with Daemon(net.pod, config):
        found = doctor(net, config)[f"web {at(family.beyond)}"]
        assert found["verdict"] == "ok"
        sock, address = server.accept()
        sock.close()
        assert address[0] == ("2001:db8::1" if family.name == "v6" else "192.0.2.1")
        assert complaints(net, config) == {}


def test_answers_that_take_another_way(net: Topology, family: Family) -> None:
    backend(net, family)
    net.beyond.ip("route del default via 10.9.2.1", "route add blackhole 192.0.2.0/24")
    net.beyond.ip("route del default via fd00:9:2::1", "route add blackhole 2001:db8::/32")
    config = to_neighbour(family, source="client")
    with Daemon(net.pod, config):
        found = complaints(net, config)[f"web {at(family.beyond)}"]
        assert found["verdict"] == "fail"
        assert found["detail"].startswith(f"answers {family.pod_beyond}, but as ")
        assert f"ip route add CLIENTS via {family.pod_beyond}" in found["remedy"]


def test_a_backend_that_refuses(net: Topology, family: Family) -> None:
    """That its refusal came home is what was to be known."""
    net.beyond.ip("link set lo up")
    config = to_neighbour(family, source="client")
    with Daemon(net.pod, config):
        found = complaints(net, config)[f"web {at(family.beyond)}"]
        assert found["verdict"] == "warn"
        assert "its answer came home" in found["detail"]


def test_a_backend_that_is_gone(net: Topology, family: Family) -> None:
    net.beyond.ip("link set b0 down")
    config = to_neighbour(family, source="client")
    with Daemon(net.pod, config):
        found = complaints(net, config)[f"web {at(family.beyond)}"]
        assert found["verdict"] == "fail"
        assert "does not answer this host either" in found["detail"]


def test_without_the_rules(net: Topology, family: Family) -> None:
    backend(net, family)
    config = to_neighbour(family, source="client")
    with Daemon(net.pod, config, install=False):
        found = complaints(net, config)
        assert found["rules"]["detail"] == "none, so upstreams that see the client can't answer us"


def test_an_ordinary_proxy_needs_nothing(net: Topology, family: Family) -> None:
    backend(net, family)
    config = to_neighbour(family)
    with Daemon(net.pod, config):
        found = doctor(net, config)
        assert {check["verdict"] for check in found.values()} == {"ok"}
        assert found[f"web {at(family.beyond)}"]["detail"] == "answers"
        assert "none are needed" in found["rules"]["detail"]
        assert found["CAP_NET_ADMIN"]["detail"] == "not needed by this configuration"


def test_src_valid_mark(net: Topology) -> None:
    """WireGuard's wg-quick sets it; every IPv4 answer is then dropped where it arrives."""
    server = backend(net, V4)
    config = to_neighbour(V4, source="client", connect_timeout_s=0.5)
    net.pod.sysctl("net/ipv4/conf/all/src_valid_mark", 1)
    with Daemon(net.pod, config) as daemon:
        net.connect_and_end(V4, 8000)
        assert daemon.wait_log()[0]["close_reason"] == "upstream_timeout"
        found = complaints(net, config)["src_valid_mark"]
        assert found["verdict"] == "fail"
        assert "p1" in found["detail"]
        for name in ("p0", "p1"):  # what it says
            net.pod.sysctl(f"net/ipv4/conf/{name}/accept_local", 1)
            net.pod.sysctl(f"net/ipv4/conf/{name}/rp_filter", 2)
        net.keep(net.client.connect(V4.pod, 8000))
        server.accept()[0].close()
        assert "src_valid_mark" not in complaints(net, config)


ROUTER = '[[listener]]\nintercept = { scope = "forward", ports = [80] }\n'


def test_a_router(net: Topology) -> None:
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        net.pod.sysctl(name, 1)
    with Daemon(net.pod, ROUTER):
        assert complaints(net, ROUTER) == {}
        net.pod.sysctl("net/ipv4/ip_forward", 0)
        net.pod.sysctl("net/ipv4/tcp_syncookies", 2)
        found = complaints(net, ROUTER)
        assert found.keys() == {"forwarding IPv4", "tcp_syncookies"}


def test_an_ordinary_proxy_whose_backend_is_down(net: Topology) -> None:
    config = to_neighbour(V4, "127.0.0.1:81", "unix:/no/such.sock")
    with Daemon(net.pod, config):
        found = complaints(net, config)
        assert found["web 127.0.0.1:81"]["detail"] == "does not answer: Connection refused"
        assert found["web unix:/no/such.sock"]["detail"].endswith("No such file or directory")


def test_a_name(net: Topology) -> None:
    config = to_neighbour(V4, "localhost:80", "no-such-name.invalid:80")
    found = doctor(net, config)
    assert "127.0.0.1" in found["name localhost"]["detail"]
    assert found["name no-such-name.invalid"]["verdict"] == "fail"
